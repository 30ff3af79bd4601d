"""The run of `prm-search eval`: its models, its records, and the report that is made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..answers import Answer
from ..evaluation.plan import Plan, Unit
from ..evaluation.report import PLOTS_NEED, table, write_report
from ..evaluation.samples import Judge
from ..policies.replay import ReplayPolicy
from ..problems import Problem
from ..recording import Recording
from ..scorers.replay import ReplayScorer
from . import BadInput, options
from .eval_kept import Keep, Tell
from .groups import Engine, Place
from .problems import at_lines, encoded
from .records import Item, digests, finished, reason
from .workers import Failures, Workers, absolute, absolutes, place_of, sent_whole

if TYPE_CHECKING:
    from ..distributed import Cluster
    from ..driver.result import Result
    from ..evaluation.responses import Answered

RECORDS, RUN = "records.jsonl", "run.json"


@dataclass(frozen=True)
class NamedModels:
    """The policy, the pairs and other scorers, by name, as options have them.

    Raises:
        BadInput: a pair or scorer is named twice, or a pair in two ways.
    """

    policy: str | None
    pairs: Sequence[str]
    prm: str | None
    reference: str | None
    beta: float | None
    device: str
    dtype: str
    engine: Engine
    scorers: Sequence[tuple[str, str | None]] = ()  # with what each is; None to find out
    replay: str | None = None  # a recording, in place of the policy

    def __post_init__(self) -> None:
        if len(set(self.pairs)) < len(self.pairs):
            raise BadInput(f"--pair {', '.join(self.pairs)}: one is named twice")
        if len(set(self.names)) < len(self.names):
            raise BadInput(f"--scorer {', '.join(name for name, _ in self.scorers)}: one is named twice")
        options.check_models(next(iter(self.pairs), None), self.prm, self.reference, needed=False)

    @property
    def names(self) -> list[str]:
        """Names of the pairs and the other scorers, in order."""
        pairs = list(self.pairs) or ([] if self.prm is None else [self.prm])
        named = [*pairs, *(name for name, _ in self.scorers)]
        return named if named or self.replay is None else list(self.recording.scorers)

    @cached_property
    def recording(self) -> Recording:
        """The recording. Raises BadInput where the file holds none."""
        try:
            return Recording(str(self.replay))
        except (OSError, ValueError) as error:
            raise BadInput(f"--replay {reason(error)}") from error

    @property
    def recorded(self) -> bool:
        """Return True if the scorers are those of the recording."""
        return self.replay is not None and not (self.pairs or self.prm or self.scorers)

    @property
    def cards(self) -> list[str]:
        """Return what may hold a pair card."""
        return [*self.pairs, *(name for name, _ in self.scorers)]

    def card(self) -> dict[str, Any]:
        """Return which models, as reports say it."""
        models: dict[str, Any] = {
            "policy": self.policy,
            "pairs": self.names,
            "reference": self.reference,
            "beta": self.beta,
        }
        if self.replay is not None:
            models["replay"] = self.replay
        if self.scorers:
            models["formats"] = {name: format for name, format in self.scorers if format is not None}
        if self.engine.remote:
            return {**models, "server": self.engine.base_url, "engine options": self.engine.arguments()}
        if self.engine.engine == "hf":
            return models
        return {**models, "engine": self.engine.engine, "engine options": self.engine.arguments()}

    def about(self) -> dict[str, Any]:
        """The same with the reference and beta that the pairs' cards name, where no option does: for a reader."""
        from ..scorers.pair import BETA

        models = self.card()
        pairs = [] if self.recorded else self.names[: len(self.names) - len(self.scorers)]
        cards = {name: options.pair_card(name) or {} for name in pairs}
        for field, default in (("reference", None), ("beta", BETA)):
            if models[field] is None and cards:
                by_pair = {name: card.get(field, default) for name, card in cards.items()}
                models[field] = by_pair if len(set(by_pair.values())) > 1 else next(iter(by_pair.values()))
        return models

    def load(self) -> tuple[Any, list[Any]]:
        """The policy, or None without one, and the scorers."""
        if self.replay is not None:
            policy: Any = ReplayPolicy(self.recording)
        else:
            policy = None if self.policy is None else self.load_policy()
        if self.recorded:
            return policy, [ReplayScorer(self.recording, name) for name in self.names]
        return policy, [self.load_scorer(name) for name in self.names]

    def load_policy(self) -> Any:
        """The policy, which there is."""
        from .models import quiet

        quiet()
        return self.engine.load(str(self.policy), Place(device=self.device, dtype=self.dtype))

    def load_scorer(self, name: str, model: str | None = None) -> Any:
        """One of the scorers. `model` is where it lies, if not where its name says."""
        from .models import load_pair, load_scorer, quiet

        quiet()
        where = Place(device=self.device, dtype=self.dtype).options()
        formats = dict(self.scorers)
        if name in formats:
            return load_scorer(model or name, formats[name], name=name, **where)
        if self.prm is not None:
            return load_pair(None, self.prm, self.reference, beta=self.beta, name=name, **where)
        return load_pair(model or name, None, None, beta=self.beta, name=name, **where)

    def sent(self, cluster: Cluster) -> NamedModels:
        """The same for workers of a cluster: whole paths, and their device. The pairs keep their names."""
        place = place_of(Place(device=self.device, dtype=self.dtype), cluster, self.engine.engine)
        policy = None if self.policy is None else absolute(self.policy)
        return replace(absolutes(self), policy=policy, device=place.device)


@dataclass(frozen=True)
class EvalRun:
    """One evaluation.

    Attributes:
        items: the problems.
        answered: the same with their responses, where those exist already; otherwise empty.
        plan, judge, answer: see evaluation.evaluate.
        models: see Models.
        record: a file for every draw and score, or None.
    """

    items: Sequence[Item]
    answered: Sequence[Answered]
    plan: Plan
    judge: Judge
    answer: Answer | str | None
    models: NamedModels
    record: str | None = None

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

    def records_of(
        self,
        workers: Workers,
        done: Mapping[int, dict[str, Any]],
        batch: int,
        failures: Failures,
        tell: Tell,
        keep: Keep | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Compute what is missing, by workers where there are some, or by this process. Raises as those do.

        What `tell` tells of each search that ends is kept before its record is given out.
        """
        if workers.ray is None:
            return self.records(done, batch, failures, tell, keep)
        return self.records_of_workers(done, batch, workers, failures, tell, keep)

    def records(
        self,
        done: Mapping[int, dict[str, Any]],
        batch: int,
        failures: Failures,
        tell: Tell,
        keep: Keep | None,
    ) -> Iterator[dict[str, Any]]:
        """Load the models here, and run what is missing; the bar watches them. Raises BadInput that names a line."""
        from ..evaluation.responses import evaluate_responses
        from ..evaluation.run import evaluate

        policy, scorers = self.models.load()
        failures.bar.watch(policy, *scorers)
        how: dict[str, Any] = {
            "scorers": scorers, "plan": self.plan, "judge": self.judge, "answer": self.answer, "done": done
        }  # fmt: skip
        with at_lines(self.items):
            if self.answered:
                yield from map(self._named, evaluate_responses(self.answered, **how))
            else:

                def told(unit: Unit, result: Result) -> None:
                    if keep is not None:
                        keep(unit, tell(unit, result, policy, scorers))

                problems = [encoded(item, policy) for item in self.items]
                flow = evaluate(
                    problems, policy=policy, batch=batch, on_result=told,
                    on_failure=lambda unit, result: failures.lost(unit.problem, str(result.failure)), **how,
                )  # fmt: skip
                yield from map(self._named, flow)

    def records_of_workers(
        self,
        done: Mapping[int, dict[str, Any]],
        batch: int,
        workers: Workers,
        failures: Failures,
        tell: Tell,
        keep: Keep | None,
    ) -> Iterator[dict[str, Any]]:
        """The same records, as they arrive from the workers of a cluster."""
        from ..distributed import evaluate, evaluate_responses

        with workers.open(failures.bar) as cluster, at_lines(self.items):
            sent_whole(self.judge, getattr(self.judge, "same", None), getattr(self.judge, "answer", None), self.answer)
            models = self.models.sent(cluster)
            how: dict[str, Any] = {
                "scorers": {name: partial(models.load_scorer, name, absolute(name)) for name in self.models.names},
                "plan": self.plan, "judge": self.judge, "answer": self.answer, "done": done, "cluster": cluster,
                "on_failure": failures,
            }  # fmt: skip
            if self.answered:
                flow = evaluate_responses(self.answered, **how)
            else:
                problems = [Problem(item.prompt, str(item.response)) for item in self.items]
                if keep is not None:
                    how |= {"tell": tell, "on_told": keep}
                flow = evaluate(problems, policy=models.load_policy, batch=batch, **how)
            yield from map(self._named, flow)

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with its problem's id, where that has one."""
        extra = self.items[record["problem"]].extra
        return {**record, **({"id": extra["id"]} if "id" in extra else {})}


def describe(folder: Path, about: Mapping[str, Any]) -> None:
    """Note beside the records what they are of, for `rebuild`: title, expected number, and what was evaluated."""
    (folder / RUN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def rebuild(folder: Path) -> dict[str, Any]:
    """Make the report of a folder from its records, and print its table.

    Returns what `describe` noted. Raises BadInput where the folder has none.
    """
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
    return dict(about)
