"""rollout: labelled responses by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

from ..checks import count
from ..problems import Problem
from ..protocols import PolicyBase, Sampling
from ..training.rollouts import Label, Rollout, RolloutJob, draw_rollouts
from ..tree import Prompt
from .cluster import Cluster
from .crew import Crew
from .loading import Load, policy_loader
from .runs import OnFailure, check_open, distribute, encoded
from .worker import Entry, Feed, Task


def rollout(
    problems: Sequence[Problem],
    *,
    cluster: Cluster,
    policy: str | Load,
    n: int,
    sampling: Sampling,
    label: Label,
    done: Collection[tuple[int, int]] = (),
    batch: int = 32,
    on_failure: OnFailure | None = None,
) -> Iterator[Rollout]:
    """`sample_rollouts` by the workers of a cluster: the same responses, in another order.

    Args:
        problems, n, sampling, done: as of sample_rollouts.
        cluster: is open.
        policy: hub id or folder of a transformers model, or a function without arguments that loads any policy in the
            worker that calls it.
        label: as of sample_rollouts; it is sent to the workers, which label.
        batch: problems that a worker samples together; changes no response.
        on_failure: called with each problem that failed; None to raise FailedProblems once all others are done.

    Raises:
        ClusterError: a worker cannot load the policy, or all workers were lost too often.
        ValueError: n or batch is below 1, or a prompt is empty or too long (the message names it).
        TypeError: policy is a model.
    """
    count("n", n)
    count("batch", batch)
    check_open(cluster)
    open_work = partial(RolloutWork, policy_loader(policy), n, sampling, label, batch)
    return _rollout(problems, cluster, open_work, n, frozenset(done), batch, on_failure)


def _rollout(
    problems: Sequence[Problem],
    cluster: Cluster,
    open_work: partial[RolloutWork],
    n: int,
    done: frozenset[tuple[int, int]],
    batch: int,
    on_failure: OnFailure | None,
) -> Iterator[Rollout]:
    with Crew(cluster, open_work) as crew:
        prompts = encoded(crew, [problem.prompt for problem in problems])
        wanted = {i: tuple(i * n + k for k in range(n) if (i, k) not in done) for i in range(len(problems))}
        tasks = {i: Task(i, places, (*prompts[i], problems[i].answer)) for i, places in wanted.items() if places}
        for _, sample in distribute(crew, cluster, tasks, batch, on_failure):
            yield sample


class RolloutWork:
    """A policy in a worker; see worker.Work."""

    def __init__(self, load: Load, n: int, sampling: Sampling, label: Label, batch: int) -> None:
        self._policy = load()
        self._own = PolicyBase.of(self._policy)
        self._n, self._sampling, self._label, self._batch = n, sampling, label, batch
        if sampling.stop and not self._own.takes_stop:
            raise ValueError(f"stop={sampling.stop!r}: this policy takes no stop strings")

    @property
    def forward_calls(self) -> int:
        """Forwards of the policy."""
        return self._own.forward_calls or 0

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See worker.Work."""
        return tuple(self._policy.encode(prompt))

    def run(self, feed: Feed) -> Iterator[Entry]:
        """The responses that tasks want. A content is a prompt, its occurrence and the reference answer."""

        def take(room: int) -> list[RolloutJob]:
            return list(map(self._job, feed.take(room, wait=room == self._batch)))

        drawn = draw_rollouts(take, policy=self._policy, sampling=self._sampling, label=self._label, batch=self._batch)
        for sample in drawn:
            yield Entry(sample.problem, sample.problem * self._n + sample.sample, sample)

    def _job(self, task: Task) -> RolloutJob:
        prompt, occurrence, answer = task.content
        samples = tuple(index - task.place * self._n for index in task.wanted)
        return RolloutJob(task.place, prompt, occurrence, answer, samples)
