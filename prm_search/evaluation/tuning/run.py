"""The trials' run: one record a problem and trial, with the outcome and the cost of every way to answer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ...answers import Answer
from ...driver.budget import Budget
from ...driver.loop import Job
from ...driver.participants import Participants
from ...driver.result import Result
from ...driver.search_settings import SearchSettings
from ...problems import Problem
from ...protocols import Policy, PolicyBase, RequestFailed, Sampling, Scorer
from ...search import encode_all
from ...strategies import BestOfN, Steer
from ...tree import Prompt
from ..plan import OWN, Cell
from ..run import read_samples, run_searches
from ..samples import Cost, Judge, Judging, Sample, choose, tokens_of
from .pilot import PILOT, PROBE, Pilot, scale_of
from .trials import Config, Scale, Trial

Record = dict[str, Any]

OnFailure = Callable[[int, str], object]  # of a problem's place, and the reason


@dataclass(frozen=True)
class Asked:
    """A problem, as it is searched for.

    Attributes:
        prompt: with token ids.
        occurrence: how many equal ones stand before it among all problems.
        answer: the right one.
    """

    prompt: Prompt
    occurrence: int
    answer: str


@dataclass(frozen=True)
class Bench:
    """The models and the rules of all trials.

    Args:
        policy: samples; not to be used for anything else meanwhile.
        scorers: by name; at least one.
        judge: of a complete response's text and the right answer; see evaluation.evaluate.
        answer: finds what a response votes for.
        sampling: how tokens are drawn, with the seed.
        batch: problems searched together; changes no record but its seconds.
        seconds: of a problem's search at most; None for no limit.
    """

    policy: Policy
    scorers: Mapping[str, Scorer]
    judge: Judge
    answer: Answer
    sampling: Sampling
    batch: int = 32
    seconds: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.scorers:
            raise ValueError("scorers is empty: at least one reward model is needed")

    @property
    def names(self) -> list[str]:
        """Names of the scorers."""
        return list(self.scorers)

    def encode(self, prompt: Prompt) -> Prompt:
        """A prompt with the policy's token ids. Raises ValueError where it does not fit the policy or a scorer."""
        own, encoded = PolicyBase.of(self.policy), prompt
        for scorer in self.scorers.values():  # whose context may be shorter
            encoded = Participants(self.policy, own, scorer, None, None).encode(prompt)
        return encoded

    def scale(
        self, problems: Sequence[Problem], values: Sequence[str], *, on_failure: OnFailure | None = None
    ) -> Scale:
        """Draw a few samples of some problems, and see how long they are and how far their values spread.

        Raises ValueError where a prompt does not fit, or no problem was answered.
        """
        asked = self._asked(problems[:PILOT])
        answered = self.outcomes(Pilot(tuple(values)), asked, on_failure)
        return scale_of([{"problem": place, **outcome} for place, outcome in answered], self.names, values)

    def records(
        self,
        trials: Sequence[Trial],
        problems: Sequence[Problem],
        done: Container[int] = (),
        *,
        wanted: Container[int] | None = None,
        on_failure: OnFailure | None = None,
    ) -> Iterator[Record]:
        """Run what is missing of these trials.

        Args:
            trials: in the order in which records count them.
            problems: likewise.
            done: indices of records that are there.
            wanted: indices of those that are asked for; None for all.
            on_failure: called with the place of a problem that the policy gave up on, and the reason; it has no further
                records. None to raise RequestFailed.

        Yields:
            Records, plain values, as they are finished: "index" is trial * len(problems) + problem, "ways" has right,
            policy_tokens, prm_tokens, reference_tokens and seconds of each of the trial's configs. Of whole samples
            "difficulty" is scorer -> value -> mean of the first PROBE samples. Seconds are wall time, of forwards that
            searches share in equal parts.

        Raises:
            ValueError: a prompt is empty or too long; the message begins with "problems[place]:".
        """
        asked = self._asked(problems)
        lost: set[int] = set()

        def give_up(place: int, reason: str) -> None:
            if on_failure is None:
                raise RequestFailed(reason)
            lost.add(place)
            on_failure(place, reason)

        for number, missing in missing_of(trials, len(problems), done, wanted):
            some = {place: asked[place] for place in missing if place not in lost}
            for place, outcome in self.outcomes(trials[number], some, give_up):
                yield record_of(number * len(problems) + place, number, place, outcome)

    def _asked(self, problems: Sequence[Problem]) -> dict[int, Asked]:
        prompts = encode_all([problem.prompt for problem in problems], self.encode, "problems[{}]".format)
        return {
            place: Asked(prompt, occurrence, problems[place].answer)
            for place, (prompt, occurrence) in enumerate(prompts)
        }

    def outcomes(
        self, job: Trial | Pilot, asked: Mapping[int, Asked], on_failure: OnFailure | None = None
    ) -> Iterator[tuple[int, Record]]:
        """Search for these problems; the place of each with what its record says, as it ends.

        Args:
            job: what is done.
            asked: by place.
            on_failure: as of `records`.
        """
        trial = Trial(BestOfN(PROBE), None, None, None, ()) if isinstance(job, Pilot) else job
        scorer = None if trial.scorer is None else self.scorers[trial.scorer]
        strategy = trial.strategy
        policy = strategy.wrap(self.policy, scorer) if isinstance(strategy, Steer) else self.policy
        settings = self._settings(trial)
        jobs = [Job(each.prompt, settings, each.occurrence, place) for place, each in asked.items()]
        for one, result in run_searches(policy, scorer, jobs, self.batch):
            judging = Judging(self.judge, self.answer, asked[one.place].answer)
            if result.failure is not None:
                if on_failure is None:
                    raise RequestFailed(result.failure)
                on_failure(one.place, result.failure)
            elif isinstance(job, Pilot):
                yield one.place, self._of_pilot(job, result, judging, one.seconds)
            elif trial.whole:
                yield one.place, self._of_samples(trial, result, judging, one.seconds)
            else:
                yield one.place, self._of_search(trial, result, judging, one.seconds)

    def _settings(self, trial: Trial) -> SearchSettings:
        sampling = self.sampling
        return SearchSettings.make(
            strategy=trial.strategy, value=None if trial.value == OWN else trial.value, steps=sampling.steps,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
            seed=sampling.seed, stop=sampling.stop, include_stop_str=sampling.include_stop_str,
            budget=Budget(tokens=trial.tokens, seconds=None if trial.whole else self.seconds),
            answer=self.answer,
        )  # fmt: skip

    def _read(
        self, result: Result, n: int, judging: Judging, values: Sequence[str]
    ) -> tuple[list[Sample], dict[str, Cost]]:
        return read_samples(result, n, policy=self.policy, scorers=self.scorers, values=values, judging=judging)

    def _of_pilot(self, pilot: Pilot, result: Result, judging: Judging, seconds: float) -> Record:
        """The record of a pilot; see scale_of."""
        samples, costs = self._read(result, PROBE, judging, pilot.values)
        return {
            "tokens": [one.tokens for one in samples],
            "depths": [node.depth for node in result.candidates for _ in range(node.count)],
            "values": {
                scorer: {value: [one.values[scorer][value] for one in samples] for value in pilot.values}
                for scorer in self.scorers
            },
            "seconds": seconds + sum(cost.seconds for cost in costs.values()),
            "top_tokens": PolicyBase.of(self.policy).top_tokens,
        }

    def _of_samples(self, trial: Trial, result: Result, judging: Judging, seconds: float) -> Record:
        """The record of whole samples: every config chooses among the first of them."""
        n = trial.strategy.n  # type: ignore[attr-defined]
        values = list(dict.fromkeys(config.value for config in trial.configs if config.value is not None))
        samples, costs = self._read(result, n, judging, values)
        plain = {"samples": [{"tokens": one.tokens} for one in samples]}
        policy_tokens = {k: tokens_of(plain, k) for k in {_n(config) for config in trial.configs} | {n}}
        prompt = len(result.tree.prompt_ids)
        ways = []
        for config in trial.configs:
            k = _n(config)
            cost = Cost(0, 0, 0.0) if config.scorer is None else costs[config.scorer]
            share = _share(prompt, samples, k)
            ways.append({
                "right": _chosen(samples, config).right,
                "policy_tokens": policy_tokens[k],
                "prm_tokens": round(cost.prm_tokens * share, 1),
                "reference_tokens": round(cost.reference_tokens * share, 1),
                "seconds": seconds * policy_tokens[k] / policy_tokens[n] + cost.seconds * share,
            })  # fmt: skip
        difficulty = {
            scorer: {value: fmean(one.values[scorer][value] for one in samples[:PROBE]) for value in values}
            for scorer in self.scorers
        }
        return {"ways": ways, "difficulty": difficulty}

    def _of_search(self, trial: Trial, result: Result, judging: Judging, seconds: float) -> Record:
        """The record of a search: every config chooses among its candidates."""
        usage = result.usage
        cost = {
            "policy_tokens": sum(usage.sampled_tokens.values()), "prm_tokens": usage.of_role("prm"),
            "reference_tokens": usage.of_role("reference"), "seconds": seconds,
        }  # fmt: skip
        ways = []
        for config in trial.configs:
            rule = SearchSettings.make(
                select=config.select, answer=self.answer, weight_temperature=config.weight_temperature
            )
            selection = rule.choose(result.candidates)
            node = None if selection is None else selection.node
            right = node is not None and judging(node.path_text(), node.finish)[1]
            ways.append({"right": right, **cost})
        return {"ways": ways, "stopped": result.stopped}


def missing_of(
    trials: Sequence[Trial], problems: int, done: Container[int], wanted: Container[int] | None
) -> Iterator[tuple[int, list[int]]]:
    """The trials with the places of the problems whose records are asked for and are not done."""
    for number in range(len(trials)):
        indices = range(number * problems, (number + 1) * problems)
        missing = [i - indices.start for i in indices if i not in done and (wanted is None or i in wanted)]
        if missing:
            yield number, missing


def record_of(index: int, trial: int, problem: int, outcome: Record) -> Record:
    """A record, of what Bench.outcomes gives."""
    return {"index": index, "trial": trial, "problem": problem, **outcome}


def _n(config: Config) -> int:
    n: int = config.strategy.n  # type: ignore[attr-defined]
    return n


def _share(prompt: int, samples: Sequence[Sample], n: int) -> float:
    """Return what part of the tokens that a scorer reads the first n samples are, the prompt included."""
    return (prompt + sum(one.new_tokens for one in samples[:n])) / (prompt + sum(one.new_tokens for one in samples))


def _chosen(samples: Sequence[Sample], config: Config) -> Sample:
    name = {"best": "best_of_n", "weighted": "weighted", "majority": "majority"}[config.select]
    weight = "softmax" if config.select == "weighted" else None
    cell = Cell(name, _n(config), config.scorer, config.value, weight)
    return choose(samples, cell, weight_temperature=config.weight_temperature)
