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
from typing import Any

from ..answers import Answer
from ..evaluation.report import PLOTS_NEED
from ..evaluation.samples import Judge
from ..evaluation.tuning.confirm import Verdict, confirming, contests, verdicts
from ..evaluation.tuning.guidance import guidance, write_guidance
from ..evaluation.tuning.pick import Table
from ..evaluation.tuning.race import Race, Standing
from ..evaluation.tuning.report import write_tuning
from ..evaluation.tuning.trials import Scale
from ..protocols import Sampling
from ..steps import StepRule
from . import BadInput
from .eval_run import NamedModels
from .left_out import LeftOut
from .progress import Bar
from .records import Item, RecordFile, digests, finished, report
from .tried import Tried
from .tune_bench import TuneBench
from .workers import Workers

PILOT, TRIALS, CONFIRM, GUIDANCE = "pilot.json", "trials.jsonl", "confirm.jsonl", "guidance.yaml"
FAILED = "failed.json"
LEAST = 4  # problems


def halves(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Problems in the order of a hash of their prompts, and cut in the middle; equal prompts are in the same half.

    Raises BadInput where there are fewer than LEAST distinct ones.
    """
    by_prompt: dict[str, list[Item]] = {}
    for item in items:
        prompt = item.prompt
        text = json.dumps([prompt.text, [dict(m) for m in prompt.messages or ()], prompt.token_ids])
        by_prompt.setdefault(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), []).append(item)
    ordered = [by_prompt[name] for name in sorted(by_prompt)]
    if len(ordered) < LEAST:
        raise BadInput(f"--data has {len(ordered)} distinct problems: at least {LEAST} are needed")
    middle = (len(ordered) + 1) // 2
    return [one for some in ordered[:middle] for one in some], [one for some in ordered[middle:] for one in some]


@dataclass(frozen=True)
class TuneRun:
    """One call of the command.

    Attributes:
        folder: for everything that is written.
        items: the problems.
        tried: the budgets, and what is tried.
        models: the policy and the scorers.
        workers: of a cluster, or none.
        judge, answer: see evaluation.tuning.run.Bench; the answer may be a name.
        answer_name: what a guidance file says of the answer.
        rule: where steps end.
        draws, seed: of Sampling.
        settings: the options that a record's key is of.
        resume, batch, title: see the options.
    """

    folder: Path
    items: Sequence[Item]
    tried: Tried
    models: NamedModels
    workers: Workers
    judge: Judge
    answer: Answer | str | None
    answer_name: str | None
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
        """The problems for choosing, and those for confirming."""
        return halves(self.items)

    @cached_property
    def sampling(self) -> Sampling:
        """The rule by which tokens are drawn."""
        return Sampling(self.rule, seed=self.seed, **self.draws)

    @cached_property
    def left_out(self) -> LeftOut:
        """The problems that failed, in this call or before."""
        choosing, confirm = self.halves
        return LeftOut(self.folder / FAILED, {TRIALS: choosing, CONFIRM: confirm})

    def go(self) -> None:
        """Everything that is not done, and then the report. Raises BadInput where problems failed."""
        if self.folder.exists() and not self.resume and any((self.folder / name).exists() for name in (PILOT, TRIALS)):
            raise BadInput(
                f"--out {self.folder} holds a tuning: --resume goes on with it, otherwise name another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        choosing, confirm = self.halves
        bar = Bar("pilot", 1)
        bench = TuneBench(
            self.models, self.workers, bar, judge=self.judge, answer=self.answer, sampling=self.sampling,
            batch=self.batch, seconds=self.tried.budget_seconds,
        )  # fmt: skip
        with bench, bar:
            scale = self._scale(bench, bar)
            race = self._race(scale)
            records = self._records(TRIALS, race, choosing, bench, bar)
            found = contests(self._table(race, records), scale, self.tried.limits, bins=self.tried.bins)
            trials = confirming(found)
            self._records(CONFIRM, Race(trials, len(confirm), 1, on=False), confirm, bench, bar)
        self.report()
        self.left_out.check()

    def report(self) -> None:
        """Make table, plots and guidance from the records. Raises BadInput where they are not all there."""
        confirm = self.halves[1]
        scale = self._scale()
        race = self._race(scale)
        try:
            records = {record["index"]: record for record in finished(self.folder / TRIALS)}
            table = self._table(race, records)
            found = contests(table, scale, self.tried.limits, bins=self.tried.bins)
            judged = verdicts(
                found, confirming(found), finished(self.folder / CONFIRM), len(confirm), self.left_out.places(CONFIRM)
            )
        except ValueError as error:
            raise BadInput(f"--out {self.folder}: {error}") from error
        about = {
            **self.models.about(),
            "problems": f"{table.right.shape[1]} to choose on, {judged[0].comparison.problems} to confirm on",
            **self.left_out.about(),
            "a whole sample": f"{scale.tokens:.1f} tokens, {scale.steps:.1f} steps",
            "tried": sum(len(trial.configs) for trial in race.trials), "seed": self.seed,
        }  # fmt: skip
        dropped = race.dropped_lines(records, self.left_out.places(TRIALS))
        print(write_tuning(self.folder, table, judged, about, title=self.title, dropped=dropped))
        for verdict in judged:
            print(verdict.sentence)
            self._guide(verdict, last=verdict is judged[-1])
        print(f"{self.folder}: {GUIDANCE}, tune.md, tune.json", file=sys.stderr)
        if find_spec("matplotlib") is None:
            print(f"prm-search: {PLOTS_NEED}, and --report-only", file=sys.stderr)

    def _guide(self, verdict: Verdict, *, last: bool) -> None:
        """Write the guidance of a budget; that of the largest is guidance.yaml."""
        chosen, limit = verdict.chosen, verdict.contest.limit
        models = self._named(chosen.scorer)
        content = guidance(chosen, self.sampling, answer=self.answer_name, models=models, seconds=limit.seconds)
        note = f"Written by prm-search tune.\n{verdict.sentence}."
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

    def _scale(self, bench: TuneBench | None = None, bar: Bar | None = None) -> Scale:
        """The scale, drawn once and kept, so that the trials stay the same. Raises BadInput where there is no bench."""
        path = self.folder / PILOT
        key = digests(self.halves[0][:1], *self._key())[0]
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("key", None) != key:
                raise BadInput(f"{path}: of other inputs or settings; --resume needs the same ones")
            return Scale(**kept)
        if bench is None or bar is None:
            raise BadInput(f"--out {self.folder} holds no tuning")
        with bench.of(self.halves[0]) as (opened, problems):
            scale = opened.scale(problems, self.tried.grid((1,)).values, on_failure=self.left_out.taker(TRIALS, bar))
        path.write_text(json.dumps({"key": key, **scale.card()}) + "\n", encoding="utf-8")
        return scale

    def _race(self, scale: Scale) -> Race:
        """The race of the trials: within the budgets in tokens, or within what seconds seem to pay for."""
        budgets = self.tried.tokens
        if self.tried.budget_seconds is not None:
            whole = self.tried.budget_seconds / scale.seconds
            budgets = sorted({max(1, round(whole * share)) for share in (0.5, 1.0, 2.0)})
        elif len(budgets) == 1 and self.tried.bins > 1:
            budgets = [round(0.75 * budgets[0]), *budgets]  # a choice by difficulty has to leave room for its probe
        trials = self.tried.grid(budgets).trials(scale, self.models.names)
        cost = "policy_tokens" if self.tried.budget_seconds is None else "seconds"
        return Race(trials, len(self.halves[0]), self.tried.bins, cost, on=self.tried.race)

    def _table(self, race: Race, records: Mapping[int, Mapping[str, Any]]) -> Table:
        """The outcomes of what is still in the race at its end. Raises ValueError where records are missing."""
        left_out = self.left_out.places(TRIALS)
        return race.table(records, race.standing(records, left_out).trials, left_out)

    def _records(
        self, name: str, race: Race, items: Sequence[Item], bench: TuneBench, bar: Bar
    ) -> dict[int, dict[str, Any]]:
        """The records of a race by their indices, of which the file has some already."""
        keys = [key for trial in race.trials for key in digests(items, *self._key(), repr(trial))]

        def standing() -> Standing:
            return race.standing(records, self.left_out.places(name))

        with RecordFile(str(self.folder / name), keys, resume=True) as file:
            records = dict(file.done)
            try:
                while (now := standing()).missing:
                    bar.at(name.partition(".")[0], len(records), len(records) + now.left)
                    with bench.of(items) as (opened, problems):
                        flow = opened.records(
                            race.trials, problems, wanted=set(now.missing), on_failure=self.left_out.taker(name, bar)
                        )
                        for record in flow:
                            records[record["index"]] = record
                            file.write({"key": keys[record["index"]], **record})
                            bar.tick()
                file.put_in_order()
            finally:
                report(file, len(records), len(records) + standing().left)
        return records

    def _key(self) -> list[object]:
        return ["tune", self.models.card(), self.models.dtype, *self.settings, repr(self.sampling), len(self.items)]
