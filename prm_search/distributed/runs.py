"""The part that all distributed runs have in common: failures, and prompts with their occurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..prompt import Prompt, numbered
from .cluster import Cluster, Failure
from .crew import Crew
from .schedule import Schedule
from .worker import Task

OnFailure = Callable[[Failure], object]


class FailedProblems(ValueError):
    """Raised at the end of a run in which problems failed; the records of all others were given out before.

    Attributes:
        failures: in the order in which they were given up.
    """

    def __init__(self, failures: Sequence[Failure]) -> None:
        first = failures[0]
        others = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        super().__init__(f"problems[{first.place}] failed: {first.reason}{others}")
        self.failures = tuple(failures)


def distribute(
    crew: Crew,
    cluster: Cluster,
    tasks: Mapping[int, Task],
    batch: int,
    on_failure: OnFailure | None,
) -> Iterator[tuple[int, Any]]:
    """Records of tasks as they arrive, each with its index.

    Args:
        batch: problems that a worker has under way.
        on_failure: called with each problem that is given up; None to raise FailedProblems at the end.
    """
    failures: list[Failure] = []
    schedule = Schedule(tasks, workers=cluster.workers, batch=batch)
    yield from crew.run(tasks, schedule, on_failure or failures.append)
    if failures:
        raise FailedProblems(failures)


def encoded(crew: Crew, prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """Prompts with their token ids, and how many equal ones stand before each. Raises ValueError as Crew.encode."""
    ids = crew.encode(prompts)
    return numbered(prompt.with_ids(token_ids) for prompt, token_ids in zip(prompts, ids, strict=True))


def check_open(cluster: Any) -> None:
    """Raises TypeError where something else than a Cluster is passed, ValueError for one that was not entered."""
    if not isinstance(cluster, Cluster):
        raise TypeError(f"cluster must be a Cluster, got {type(cluster).__name__}")
    if not cluster.workers:
        raise ValueError("cluster is not open: use it in `with Cluster(...) as cluster:`")
