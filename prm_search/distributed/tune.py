"""ClusterBench: the trials of `tune` by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from ..answers import Answer, resolve_answer
from ..checks import count
from ..evaluation.samples import Judge
from ..evaluation.tuning.pilot import PILOT, Pilot, scale_of
from ..evaluation.tuning.run import Asked, Bench, OnFailure, Record, missing_of, record_of
from ..evaluation.tuning.trials import Scale, Trial
from ..problems import Problem, final_answer
from ..protocols import Sampling
from ..tree import Prompt
from .cluster import Cluster, Failure
from .crew import Crew
from .evaluate import forwards, load_scorers
from .loading import Load, policy_loader, scorer_loader
from .runs import check_open, distribute, encoded
from .worker import Entry, Feed, Refusal, Task

Units = Mapping[int, tuple[int, Trial | Pilot]]  # index of a record -> number of the trial, and what is done


class ClusterBench:
    """`evaluation.tuning.run.Bench` by the workers of a cluster: the same records, in another order and other seconds.

        with Cluster(workers=4) as cluster, ClusterBench(cluster=cluster, policy="Qwen/...", ...) as bench:
            trials = grid.trials(bench.scale(problems, grid.values), bench.names)
            for record in bench.records(trials, problems): ...

    The workers load their models once, at `with`. All records of a problem are made by one worker, unless that dies.

    Args:
        cluster: is open.
        policy, scorers: as of `evaluate`; at least one scorer.
        judge, answer, sampling, seconds: as of Bench; judge and answer are sent to the workers.
        batch: problems that a worker has under way; changes no record but its seconds.

    Raises:
        ClusterError: from `scale` and `records`: a worker cannot load its models, or all were lost too often.
        TypeError: a model is passed in place of its name or loader.
        ValueError: there is no scorer, or batch is below 1.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        policy: str | Load,
        scorers: Mapping[str, str | Load],
        judge: Judge,
        answer: str | Answer | None = None,
        sampling: Sampling,
        batch: int = 32,
        seconds: float | None = None,
    ) -> None:
        loaders = {name: scorer_loader(scorer, name) for name, scorer in scorers.items()}
        if not loaders:
            raise ValueError("scorers is empty: at least one reward model is needed")
        count("batch", batch)
        check_open(cluster)
        self.names = list(loaders)
        self._cluster, self._batch = cluster, batch
        extract = resolve_answer(answer) or final_answer
        self._crew = Crew(
            cluster,
            partial(TuneWork, policy_loader(policy), loaders, judge, extract, sampling, batch, seconds),
        )

    def __enter__(self) -> ClusterBench:
        self._crew.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._crew.__exit__(kind, error, trace)

    def scale(
        self, problems: Sequence[Problem], values: Sequence[str], *, on_failure: OnFailure | None = None
    ) -> Scale:
        """See Bench.scale, and `records` for on_failure."""
        pilot = Pilot(tuple(values))
        units: dict[int, Units] = {place: {place: (0, pilot)} for place in range(len(problems[:PILOT]))}
        answered = self._run(problems[:PILOT], units, on_failure)
        return scale_of([record for _, record in answered], self.names, values)

    def records(
        self,
        trials: Sequence[Trial],
        problems: Sequence[Problem],
        done: Container[int] = (),
        *,
        wanted: Container[int] | None = None,
        on_failure: OnFailure | None = None,
    ) -> Iterator[Record]:
        """See Bench.records.

        Args:
            trials, problems, done, wanted: as there.
            on_failure: called too with each problem that failed in workers three times; None to raise FailedProblems
                once all others are done.
        """
        units: dict[int, dict[int, tuple[int, Trial | Pilot]]] = {}
        for number, missing in missing_of(trials, len(problems), done, wanted):
            for place in missing:
                units.setdefault(place, {})[number * len(problems) + place] = number, trials[number]
        for _, record in self._run(problems, units, on_failure) if units else ():
            yield record

    def _run(
        self, problems: Sequence[Problem], units: Mapping[int, Units], on_failure: OnFailure | None
    ) -> Iterator[tuple[int, Any]]:
        prompts = encoded(self._crew, [problem.prompt for problem in problems])
        tasks = {
            place: Task(place, tuple(own), (Asked(*prompts[place], problems[place].answer), own))
            for place, own in sorted(units.items())
        }

        def give_up(failure: Failure) -> None:
            assert on_failure is not None
            on_failure(failure.place, failure.reason)

        yield from distribute(self._crew, self._cluster, tasks, self._batch, give_up if on_failure else None)


class TuneWork:
    """A Bench in a worker; see worker.Work."""

    def __init__(
        self,
        policy: Load,
        scorers: Mapping[str, Load],
        judge: Judge,
        extract: Answer,
        sampling: Sampling,
        batch: int,
        seconds: float | None,
    ) -> None:
        self._bench = Bench(policy(), load_scorers(scorers), judge, extract, sampling, batch, seconds=seconds)
        self._batch = batch

    @property
    def forward_calls(self) -> int:
        """Forwards of all models."""
        return forwards(self._bench.policy, *self._bench.scorers.values())

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt that fits the policy and every scorer."""
        return tuple(self._bench.encode(prompt).token_ids or ())

    def run(self, feed: Feed) -> Iterator[Entry]:
        """The records that tasks want, of `batch` problems together: those of one trial share forwards.

        A content is a problem as Asked, and Units.
        """
        while True:
            yield from self._records(feed.take(self._batch, wait=True))

    def _records(self, tasks: Sequence[Task]) -> Iterator[Entry]:
        groups: dict[tuple[int, Trial | Pilot], dict[int, tuple[int, Asked]]] = {}
        for task in tasks:
            asked, units = task.content
            for index in task.wanted:
                groups.setdefault(units[index], {})[task.place] = index, asked
        lost: dict[int, str] = {}
        for number, job in sorted(groups, key=lambda key: key[0]):
            members = {place: member for place, member in groups[number, job].items() if place not in lost}
            before = len(lost)
            asked_of = {place: asked for place, (_, asked) in members.items()}
            for place, outcome in self._bench.outcomes(job, asked_of, lost.__setitem__):
                index = members[place][0]
                yield Entry(place, index, record_of(index, number, place, outcome))
            for place in list(lost)[before:]:
                yield Entry(place, members[place][0], Refusal(lost[place]))
