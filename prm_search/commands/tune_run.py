"""The run of `prm-search tune`: a pilot, the trials, the confirmation, and what is written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..answers import Answer, resolve_answer
from ..evaluation.report import PLOTS_NEED
from ..evaluation.samples import Judge
from ..evaluation.tuning.confirm import Verdict, confirming, contests, verdicts
from ..evaluation.tuning.guidance import guidance, write_guidance
from ..evaluation.tuning.pick import Table
from ..evaluation.tuning.report import write_tuning
from ..evaluation.tuning.trials import Scale, Trial
from ..problems import Problem, final_answer
from ..protocols import Sampling
from ..steps import StepRule
from . import BadInput
from .eval_run import NamedModels
from .problems import encoded
from .progress import Bar
from .records import Item, RecordFile, digests, finished, report
from .tried import Tried

if TYPE_CHECKING:
    from ..evaluation.tuning.run import Bench

PILOT, TRIALS, CONFIRM, GUIDANCE = "pilot.json", "trials.jsonl", "confirm.jsonl", "guidance.yaml"
LEAST = 4  # problems


@dataclass(frozen=True)
class TuneRun:
    """One call of the command.

    Attributes:
        folder: for everything that is written.
        items: the problems.
        tried: the budgets, and what is tried.
        models: the policy and the scorers.
        judge, answer: see evaluation.tuning.run.Bench; the answer may be a name.
        rule: where steps end.
        draws, seed: of Sampling.
        settings: the options that a record's key is of.
        resume, batch, title: see the options.
    """

    folder: Path
    items: Sequence[Item]
    tried: Tried
    models: NamedModels
    judge: Judge
    answer: Answer | str | None
    rule: StepRule
    draws: Mapping[str, Any]
    seed: int
    settings: Sequence[object]
    resume: bool
    batch: int
    title: str

    def __post_init__(self) -> None:
        if len(self.items) < LEAST:
            raise BadInput(f"--data has {len(self.items)} problems: at least {LEAST} are needed, half to confirm on")

    @cached_property
    def halves(self) -> tuple[list[Item], list[Item]]:
        """The problems for choosing, and those for confirming; equal prompts are in the same half."""
        by_prompt: dict[str, list[Item]] = {}
        for item in self.items:
            prompt = item.prompt
            text = json.dumps([prompt.text, [dict(m) for m in prompt.messages or ()], prompt.token_ids])
            by_prompt.setdefault(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), []).append(item)
        ordered = [by_prompt[name] for name in sorted(by_prompt)]
        if len(ordered) < LEAST:
            raise BadInput(f"--data has {len(ordered)} distinct problems: at least {LEAST} are needed")
        middle = (len(ordered) + 1) // 2
        return [one for some in ordered[:middle] for one in some], [one for some in ordered[middle:] for one in some]

    @cached_property
    def sampling(self) -> Sampling:
        """The rule by which tokens are drawn."""
        return Sampling(self.rule, seed=self.seed, **self.draws)

    @cached_property
    def bench(self) -> Bench:
        """The models, loaded."""
        from ..evaluation.tuning.run import Bench

        policy, scorers = self.models.load()
        named = dict(zip(self.models.names, scorers, strict=True))
        answer = resolve_answer(self.answer) or final_answer
        return Bench(policy, named, self.judge, answer, self.sampling, self.batch, seconds=self.tried.budget_seconds)

    def go(self) -> None:
        """Everything that is not done, and then the report."""
        if self.folder.exists() and not self.resume and any((self.folder / name).exists() for name in (PILOT, TRIALS)):
            raise BadInput(
                f"--out {self.folder} holds a tuning: --resume goes on with it, otherwise name another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        choosing, confirm = self.halves
        scale = self._scale()
        trials = self._trials(scale)
        records = self._records("trials", TRIALS, trials, choosing)
        found = contests(Table.of(trials, records, len(choosing)), scale, self.tried.limits, bins=self.tried.bins)
        self._records("confirming", CONFIRM, confirming(found), confirm)
        self.report()

    def report(self) -> None:
        """Make table, plots and guidance from the records. Raises BadInput where they are not all there."""
        choosing, confirm = self.halves
        scale = self._scale(load=False)
        trials = self._trials(scale)
        try:
            table = Table.of(trials, finished(self.folder / TRIALS), len(choosing))
            found = contests(table, scale, self.tried.limits, bins=self.tried.bins)
            judged = verdicts(found, confirming(found), finished(self.folder / CONFIRM), len(confirm))
        except ValueError as error:
            raise BadInput(f"--out {self.folder}: {error}") from error
        about = {
            **self.models.about(), "problems": f"{len(choosing)} to choose on, {len(confirm)} to confirm on",
            "a whole sample": f"{scale.tokens:.1f} tokens, {scale.steps:.1f} steps", "tried": len(table.configs),
            "seed": self.seed,
        }  # fmt: skip
        print(write_tuning(self.folder, table, judged, about, title=self.title))
        for verdict in judged:
            print(verdict.sentence)
            self._guide(verdict, last=verdict is judged[-1])
        print(f"{self.folder}: {GUIDANCE}, tune.md, tune.json", file=sys.stderr)
        if find_spec("matplotlib") is None:
            print(f"prm-search: {PLOTS_NEED}, and --report-only", file=sys.stderr)

    def _guide(self, verdict: Verdict, *, last: bool) -> None:
        """Write the guidance of a budget; that of the largest is guidance.yaml."""
        chosen, limit = verdict.chosen, verdict.contest.limit
        answer = self.answer if isinstance(self.answer, str) else None
        content = guidance(
            chosen, self.sampling, answer=answer, models=self._named(chosen.scorer), seconds=limit.seconds
        )
        note = f"Written by prm-search tune.\n{verdict.sentence}."
        if callable(self.answer):
            note += "\nAnswers were found by a function, which a file cannot name: pass answer= with it."
        names = [f"guidance-{limit.title.replace(' ', '-')}.yaml"] if len(self.tried.limits) > 1 else []
        for name in [*names, *([GUIDANCE] if last else [])]:
            write_guidance(self.folder / name, content, note)

    def _named(self, scorer: str | None) -> dict[str, Any]:
        """The names of the models, as a command line has them."""
        models = self.models
        name = scorer or models.names[0]
        if name in dict(models.scorers):
            return {"policy": models.policy, "scorer": name, "prm_format": dict(models.scorers)[name]}
        if models.prm is None:
            return {"policy": models.policy, "pair": name, "beta": models.beta}
        return {"policy": models.policy, "prm": models.prm, "reference": models.reference, "beta": models.beta}

    def _scale(self, *, load: bool = True) -> Scale:
        """The scale, drawn once and kept, so that the trials stay the same."""
        path = self.folder / PILOT
        key = digests(self.halves[0][:1], *self._key())[0]
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("key", None) != key:
                raise BadInput(f"{path}: of other inputs or settings; --resume needs the same ones")
            return Scale(**kept)
        if not load:
            raise BadInput(f"--out {self.folder} holds no tuning")
        problems = self._encoded(self.halves[0])
        scale = self.bench.scale(problems, self.tried.grid((1,)).values)
        path.write_text(json.dumps({"key": key, **scale.card()}) + "\n", encoding="utf-8")
        return scale

    def _trials(self, scale: Scale) -> list[Trial]:
        """The trials: within the budgets in tokens, or within what seconds seem to pay for."""
        budgets = self.tried.tokens
        if self.tried.budget_seconds is not None:
            whole = self.tried.budget_seconds / scale.seconds
            budgets = sorted({max(1, round(whole * share)) for share in (0.5, 1.0, 2.0)})
        elif len(budgets) == 1 and self.tried.bins > 1:
            budgets = [round(0.75 * budgets[0]), *budgets]  # a choice by difficulty has to leave room for its probe
        return self.tried.grid(budgets).trials(scale, self.models.names)

    def _records(self, what: str, name: str, trials: Sequence[Trial], items: Sequence[Item]) -> list[dict[str, Any]]:
        """The records of these trials, of which the file has some already."""
        keys = [key for trial in trials for key in digests(items, *self._key(), repr(trial))]
        problems: list[Problem] = []
        with RecordFile(str(self.folder / name), keys, resume=True) as file:
            records = dict(file.done)
            try:
                if len(records) < len(keys):
                    problems = self._encoded(items)
                    with Bar(what, len(keys) - len(records)) as bar:
                        bar.watch(self.bench.policy, *self.bench.scorers.values())
                        for record in self.bench.records(trials, problems, dict(records)):
                            records[record["index"]] = record
                            file.write({"key": keys[record["index"]], **record})
                            bar.tick()
            finally:
                report(file, len(records), len(keys))
        return list(records.values())

    def _encoded(self, items: Sequence[Item]) -> list[Problem]:
        return [encoded(item, self.bench.policy) for item in items]

    def _key(self) -> list[object]:
        return ["tune", self.models.card(), self.models.dtype, *self.settings, repr(self.sampling), len(self.items)]
