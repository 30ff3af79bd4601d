"""The trials' run: one record a problem and trial, with the outcome and the cost of every way to answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from ...protocols import Policy, PolicyBase, Sampling, Scorer
from ...search import encode_all
from ...strategies import BestOfN, Steer
from ..plan import OWN, Cell
from ..run import read_samples, run_searches
from ..samples import Cost, Judge, Judging, Sample, choose, tokens_of
from .trials import Config, Scale, Trial

Record = dict[str, Any]

PROBE = 4  # whole samples that tell a problem's difficulty
PILOT = 16  # problems that tell the scale


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

    def scale(self, problems: Sequence[Problem], values: Sequence[str]) -> Scale:
        """Draw a few samples of some problems, and see how long they are and how far their values spread."""
        pilot = Trial(BestOfN(PROBE), None, None, None, ())
        groups: list[list[Sample]] = []
        depths: list[int] = []
        seconds = 0.0
        for problem, result, spent, _ in self._placed(pilot, problems[:PILOT]):
            samples, costs = self._read(result, PROBE, problem, values)
            groups.append(samples)
            depths += [node.depth for node in result.candidates for _ in range(node.count)]
            seconds += spent + sum(cost.seconds for cost in costs.values())
        tokens = sum(one.tokens for group in groups for one in group)
        spread = {
            scorer: {value: _spread([[one.values[scorer][value] for one in group] for group in groups])
                     for value in values}
            for scorer in self.scorers
        }  # fmt: skip
        return Scale(tokens / (PROBE * len(groups)), fmean(depths), seconds / tokens, spread)

    def records(
        self, trials: Sequence[Trial], problems: Sequence[Problem], done: Mapping[int, Record]
    ) -> Iterator[Record]:
        """Run what is missing of these trials.

        Yields:
            Records, plain values, as they are finished: "index" is trial * len(problems) + problem, "ways" has right,
            policy_tokens, prm_tokens, reference_tokens and seconds of each of the trial's configs. Of whole samples
            "difficulty" is scorer -> value -> mean of the first PROBE samples. Seconds are wall time, of forwards that
            searches share in equal parts.
        """
        for number, trial in enumerate(trials):
            first = number * len(problems)
            missing = {place: problem for place, problem in enumerate(problems) if first + place not in done}
            places = list(missing)
            for problem, result, seconds, at in self._placed(trial, list(missing.values())):
                read = self._of_samples if trial.scorer is None else self._of_search
                yield {
                    "index": first + places[at], "trial": number, "problem": places[at],
                    **read(trial, result, problem, seconds),
                }  # fmt: skip

    def _placed(self, trial: Trial, problems: Sequence[Problem]) -> Iterator[tuple[Problem, Result, float, int]]:
        """Search for these problems; each with its result, its seconds and its place, as it ends."""
        scorer = None if trial.scorer is None else self.scorers[trial.scorer]
        strategy, sampling = trial.strategy, self.sampling
        policy = strategy.wrap(self.policy, scorer) if isinstance(strategy, Steer) else self.policy
        own = PolicyBase.of(policy)
        prompts = encode_all(
            [problem.prompt for problem in problems], Participants(policy, own, scorer, None, None).encode,
            "problems[{}]".format,
        )  # fmt: skip
        settings = SearchSettings.make(
            strategy=strategy, value=None if trial.value == OWN else trial.value, steps=sampling.steps,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
            seed=sampling.seed, stop=sampling.stop, include_stop_str=sampling.include_stop_str,
            budget=Budget(tokens=trial.tokens, seconds=self.seconds if trial.scorer is not None else None),
        )  # fmt: skip
        jobs = [Job(prompt, settings, occurrence, place) for place, (prompt, occurrence) in enumerate(prompts)]
        for job, result in run_searches(policy, scorer, jobs, self.batch):
            yield problems[job.place], result, job.seconds, job.place

    def _judging(self, problem: Problem) -> Judging:
        return Judging(self.judge, self.answer, problem.answer)

    def _read(
        self, result: Result, n: int, problem: Problem, values: Sequence[str]
    ) -> tuple[list[Sample], dict[str, Cost]]:
        return read_samples(
            result, n, policy=self.policy, scorers=self.scorers, values=values, judging=self._judging(problem)
        )

    def _of_samples(self, trial: Trial, result: Result, problem: Problem, seconds: float) -> Record:
        """The record of whole samples: every config chooses among the first of them."""
        n = trial.strategy.n  # type: ignore[attr-defined]
        values = list(dict.fromkeys(config.value for config in trial.configs if config.value is not None))
        samples, costs = self._read(result, n, problem, values)
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

    def _of_search(self, trial: Trial, result: Result, problem: Problem, seconds: float) -> Record:
        """The record of a search: every config chooses among its candidates."""
        judging, usage = self._judging(problem), result.usage
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


def _spread(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation within groups, over all of them; 1 where all are equal."""
    squares = [(x - fmean(group)) ** 2 for group in groups for x in group if math.isfinite(x)]
    return math.sqrt(sum(squares) / max(1, len(squares) - len(groups))) or 1.0
