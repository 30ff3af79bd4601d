"""The run of `prm-search eval`: its models, its records, and the report that is made of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..answers import Answer
from ..evaluation.plan import Plan, Unit
from ..evaluation.report import PLOTS_NEED, table, write_report
from ..evaluation.samples import Judge
from . import BadInput, options
from .groups import Engine, Place
from .problems import encoded
from .records import Item, digests, finished, reason

if TYPE_CHECKING:
    from ..evaluation.responses import Answered

RECORDS, RUN = "records.jsonl", "run.json"


@dataclass(frozen=True)
class NamedModels:
    """The policy and the pairs, by name, as options have them.

    Raises:
        BadInput: a pair is named twice, or in two ways.
    """

    policy: str | None
    pairs: Sequence[str]
    prm: str | None
    reference: str | None
    beta: float | None
    device: str
    dtype: str
    engine: Engine

    def __post_init__(self) -> None:
        if len(set(self.pairs)) < len(self.pairs):
            raise BadInput(f"--pair {', '.join(self.pairs)}: one is named twice")
        options.check_models(next(iter(self.pairs), None), self.prm, self.reference, needed=False)

    @property
    def names(self) -> list[str]:
        """Names of the pairs, in order."""
        return list(self.pairs) or ([] if self.prm is None else [self.prm])

    def card(self) -> dict[str, Any]:
        """Return which models, as reports say it."""
        models = {"policy": self.policy, "pairs": self.names, "reference": self.reference, "beta": self.beta}
        if self.engine.engine == "hf":
            return models
        return {**models, "engine": self.engine.engine, "engine options": self.engine.arguments()}

    def about(self) -> dict[str, Any]:
        """The same with the reference and beta that the pairs' cards name, where no option does: for a reader."""
        from ..scorers.base import BETA

        models = self.card()
        cards = {name: options.pair_card(name) or {} for name in self.names}
        for field, default in (("reference", None), ("beta", BETA)):
            if models[field] is None and cards:
                by_pair = {name: card.get(field, default) for name, card in cards.items()}
                models[field] = by_pair if len(set(by_pair.values())) > 1 else next(iter(by_pair.values()))
        return models

    def load(self) -> tuple[Any, list[Any]]:
        """The policy, or None without one, and the pairs."""
        from .models import load_pair, quiet

        quiet()
        place = Place(device=self.device, dtype=self.dtype)
        where = place.options()
        policy = None if self.policy is None else self.engine.load(self.policy, place)
        if self.prm is not None:
            return policy, [load_pair(None, self.prm, self.reference, beta=self.beta, name=self.prm, **where)]
        return policy, [load_pair(name, None, None, beta=self.beta, name=name, **where) for name in self.pairs]


@dataclass(frozen=True)
class EvalRun:
    """One evaluation.

    Attributes:
        items: the problems.
        answered: the same with their responses, where those exist already; otherwise empty.
        plan, judge, answer: see evaluation.evaluate.
        models: see Models.
    """

    items: Sequence[Item]
    answered: Sequence[Answered]
    plan: Plan
    judge: Judge
    answer: Answer | str | None
    models: NamedModels

    @property
    def units(self) -> list[Unit]:
        """Return what each record holds, in order of their indices."""
        if self.answered:
            return [Unit("samples", place) for place in range(len(self.items))]
        return self.plan.units(len(self.items), self.models.names)

    def keys(self, *settings: object) -> list[str]:
        """The key of each record: its problem under these settings."""
        names = digests(self.items, "eval", *settings)
        return [names[unit.problem] for unit in self.units]

    def records(
        self, done: Mapping[int, dict[str, Any]], batch: int, loaded: Callable[..., object]
    ) -> Iterator[dict[str, Any]]:
        """Load the models, hand them to `loaded`, and run what is missing. Raises BadInput that names a line."""
        from ..evaluation.responses import evaluate_responses
        from ..evaluation.run import evaluate

        policy, scorers = self.models.load()
        loaded(policy, *scorers)
        how: dict[str, Any] = {
            "scorers": scorers, "plan": self.plan, "judge": self.judge, "answer": self.answer, "done": done
        }  # fmt: skip
        try:
            if self.answered:
                flow = evaluate_responses(self.answered, **how)
            else:
                problems = [encoded(item, policy) for item in self.items]
                flow = evaluate(problems, policy=policy, batch=batch, **how)
            for record in flow:
                extra = self.items[record["problem"]].extra
                yield {**record, **({"id": extra["id"]} if "id" in extra else {})}
        except ValueError as error:
            message = reason(error)
            match = re.match(r"(?:problems|prompts)\[(\d+)\]:? ", message)
            if match is None:
                raise
            raise BadInput(f"{self.items[int(match[1])].where}: {message[match.end() :]}") from error


def describe(folder: Path, about: Mapping[str, Any]) -> None:
    """Note beside the records what they are of, for `rebuild`: title, expected number, and what was evaluated."""
    (folder / RUN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def rebuild(folder: Path) -> None:
    """Make the report of a folder from its records, and print its table. Raises BadInput where it has none."""
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"--out {folder} holds no evaluation: {reason(error)}") from error
    records = finished(folder / RECORDS)
    summary = write_report(records, folder, title=about["title"], about=about["about"], expected=about["expected"])
    print(table(summary))
    print(f"{folder}: report.md, report.json", file=sys.stderr)
    if find_spec("matplotlib") is None:
        print(f"prm-search: {PLOTS_NEED}, and --report-only", file=sys.stderr)
