"""evaluate and evaluate_responses: the evaluation's records by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..answers import Answer, resolve_answer
from ..checks import count
from ..driver.participants import Participants
from ..driver.result import Result
from ..evaluation.plan import Plan, Unit
from ..evaluation.responses import Answered, check_responses, response_records
from ..evaluation.run import EvaluationPart, Record, SampledTokens, check_scorers, sampled_tokens
from ..evaluation.samples import Judge, Judging
from ..problems import Problem, final_answer
from ..protocols import PolicyBase
from ..tree import Prompt
from .cluster import Cluster
from .crew import Crew
from .loading import Load, policy_loader, scorer_loader
from .runs import OnFailure, check_open, distribute, encoded
from .worker import Entry, Feed, OpenWork, Task

Tell = Callable[[Unit, Result, Any, Sequence[Any]], Any]


def evaluate(
    problems: Sequence[Problem],
    *,
    cluster: Cluster,
    policy: str | Load,
    scorers: Mapping[str, str | Load] | None = None,
    plan: Plan,
    judge: Judge,
    answer: str | Answer | None = None,
    done: Mapping[int, Record] | None = None,
    batch: int = 32,
    on_failure: OnFailure | None = None,
    tell: Tell | None = None,
    on_told: Callable[[Unit, Any], object] | None = None,
) -> Iterator[Record]:
    """`evaluation.evaluate` by the workers of a cluster: the same records, in another order, and other seconds.

    All records of a problem are made by one worker, unless that dies.

    Args:
        problems, plan, judge, answer, done: as of evaluation.evaluate; judge and answer are sent to the workers.
        cluster: is open.
        policy: as of `rollout`.
        scorers: by the names that records have: a hub id or folder (see scorers.load.load_scorer), or a function
            without arguments that loads any scorer of that name in the worker that calls it.
        batch: problems that a worker has under way; changes no record but its seconds.
        on_failure: as of `rollout`.
        tell: is sent to the workers, and called there with each search that ends: its unit, its Result, the policy, and
            the scorers. What it returns, plain values, comes with the record.
        on_told: is called with the unit and that, before the record is given out.

    Raises:
        ClusterError, TypeError: as `rollout`.
        ValueError: as evaluation.evaluate; or only one of tell and on_told is there.
    """
    if (tell is None) != (on_told is None):
        raise ValueError("tell and on_told belong together: give both, or neither")
    loaders = {name: scorer_loader(scorer, name) for name, scorer in (scorers or {}).items()}
    check_scorers(plan, list(loaders))
    count("batch", batch)
    check_open(cluster)
    extract = resolve_answer(answer) or final_answer
    open_work = partial(EvaluationWork, policy_loader(policy), loaders, plan, judge, extract, batch, tell)
    return _evaluate(problems, cluster, open_work, plan, list(loaders), done or {}, batch, on_failure, on_told)


def _evaluate(
    problems: Sequence[Problem],
    cluster: Cluster,
    open_work: OpenWork,
    plan: Plan,
    names: Sequence[str],
    done: Mapping[int, Record],
    batch: int,
    on_failure: OnFailure | None,
    on_told: Callable[[Unit, Any], object] | None,
) -> Iterator[Record]:
    with Crew(cluster, open_work) as crew:
        prompts = encoded(crew, [problem.prompt for problem in problems])
        units = dict(enumerate(plan.units(len(problems), names)))
        missing: dict[int, dict[int, Unit]] = {}
        for index, unit in units.items():
            if index not in done:
                missing.setdefault(unit.problem, {})[index] = unit
        known: dict[int, SampledTokens] = {i: {} for i in missing}
        note_samples(plan, units, done, known)
        tasks = {i: Task(i, tuple(own), (*prompts[i], problems[i].answer, own, known[i])) for i, own in missing.items()}
        for index, (record, told) in distribute(crew, cluster, tasks, batch, on_failure):
            note_samples(plan, units, {index: record}, known)  # for a worker that takes the problem over
            if on_told is not None:
                on_told(units[index], told)
            yield record


def note_samples(
    plan: Plan, units: Mapping[int, Unit], records: Mapping[int, Record], known: Mapping[int, SampledTokens]
) -> None:
    """Note what searches may sample, by the samples among finished records, for the problems that are in `known`."""
    for key, tokens in sampled_tokens(plan, units, records).items():
        if key[0] in known:
            known[key[0]][key] = tokens


class EvaluationWork:
    """A policy and scorers in a worker; see worker.Work."""

    def __init__(
        self,
        policy: Load,
        scorers: Mapping[str, Load],
        plan: Plan,
        judge: Judge,
        extract: Answer,
        batch: int,
        tell: Tell | None = None,
    ) -> None:
        self._policy = policy()
        self._own = PolicyBase.of(self._policy)
        self._scorers = load_scorers(scorers)
        self._plan, self._judge, self._extract, self._batch = plan, judge, extract, batch
        self._tell = tell

    @property
    def forward_calls(self) -> int:
        """Forwards of all models."""
        return forwards(self._own, *self._scorers.values())

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt that fits the policy and every scorer."""
        ids: tuple[int, ...] = ()
        for scorer in (None, *self._scorers.values()):
            ids = tuple(Participants(self._policy, self._own, scorer, None, None).encode(prompt).token_ids or ())
        return ids

    def run(self, feed: Feed) -> Iterator[Entry]:
        """The records that tasks want, each with what is told of its search; of `batch` problems together, so that
        searches of one strategy share forwards.

        A content is a prompt, its occurrence, the right answer, units by index, and the tokens of finished samples.
        """
        while True:
            yield from self._records(feed.take(self._batch, wait=True))

    def _records(self, tasks: Sequence[Task]) -> Iterator[Entry]:
        prompts, judgings, units, known = {}, {}, dict[int, Unit](), dict[Any, int]()
        for task in tasks:
            prompt, occurrence, answer, own, tokens = task.content
            prompts[task.place] = prompt, occurrence
            judgings[task.place] = Judging(self._judge, self._extract, answer)
            units |= {index: own[index] for index in task.wanted}
            known |= tokens
        told: list[Any] = []  # of the search whose record comes next

        def tell(unit: Unit, result: Result) -> None:
            if self._tell is not None:
                told.append(self._tell(unit, result, self._policy, list(self._scorers.values())))

        part = EvaluationPart(prompts, judgings, self._policy, self._scorers, self._plan, self._batch, tell)
        for record in part.records(dict(sorted(units.items())), known):
            yield Entry(record["problem"], record["index"], (record, told.pop() if told else None))


def evaluate_responses(
    problems: Sequence[Answered],
    *,
    cluster: Cluster,
    scorers: Mapping[str, str | Load],
    plan: Plan,
    judge: Judge | None = None,
    answer: str | Answer | None = None,
    done: Mapping[int, Record] | None = None,
    batch: int = 8,
    on_failure: OnFailure | None = None,
) -> Iterator[Record]:
    """`evaluation.evaluate_responses` by the workers of a cluster; arguments as there and of `evaluate`.

    Args:
        batch: problems that a worker is handed at a time; changes no record.
    """
    loaders = {name: scorer_loader(scorer, name) for name, scorer in scorers.items()}
    check_responses(problems, list(loaders), plan, judge)
    count("batch", batch)
    check_open(cluster)
    open_work = partial(ResponsesWork, loaders, plan, judge, resolve_answer(answer) or final_answer)
    tasks = {i: Task(i, (i,), problem) for i, problem in enumerate(problems) if i not in (done or {})}
    return _evaluate_responses(tasks, cluster, open_work, batch, on_failure)


def _evaluate_responses(
    tasks: Mapping[int, Task], cluster: Cluster, open_work: OpenWork, batch: int, on_failure: OnFailure | None
) -> Iterator[Record]:
    with Crew(cluster, open_work) as crew:
        for _, record in distribute(crew, cluster, tasks, batch, on_failure):
            yield record


class ResponsesWork:
    """Scorers in a worker, for responses that exist; see worker.Work."""

    def __init__(self, scorers: Mapping[str, Load], plan: Plan, judge: Judge | None, extract: Answer) -> None:
        self._scorers = load_scorers(scorers)
        self._plan, self._judge, self._extract = plan, judge, extract

    @property
    def forward_calls(self) -> int:
        """Forwards of the scorers."""
        return forwards(*self._scorers.values())

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids by the first scorer; a run does not ask."""
        return tuple(next(iter(self._scorers.values())).encode_prompt(prompt))

    def run(self, feed: Feed) -> Iterator[Entry]:
        """The record of each task; a content is a problem with its responses."""
        problems = ((task.place, task.content) for task in iter(lambda: feed.take(1, wait=True)[0], None))
        pairs = list(self._scorers.values())
        for record in response_records(problems, pairs, self._plan, self._judge, self._extract):
            yield Entry(record["problem"], record["index"], record)


def load_scorers(loaders: Mapping[str, Load]) -> dict[str, Any]:
    """Scorers by name. Raises ValueError where one has another name than records are to have."""
    scorers = {name: load() for name, load in loaders.items()}
    for name, scorer in scorers.items():
        if scorer.name != name:
            raise ValueError(f"scorers: the one under {name!r} is named {scorer.name!r}; both must be the same")
    return scorers


def forwards(*models: Any) -> int:
    """Forwards that models have run, where they say so."""
    return sum(int(getattr(model, "forward_calls", 0) or 0) for model in models)
