"""Crew: the workers of one run. It starts them, hands out chunks, and replaces those that die."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..tree import Prompt
from .cluster import Cluster, ClusterError, Failure, import_ray
from .schedule import TRIES, Schedule
from .worker import About, Message, OpenWork, Refusal, Task, Worker, versions

IN_A_ROW = 5  # losses of one worker without a record between them, after which it is not replaced
PATIENCE = 30.0  # seconds without news, after which workers that have no machine yet are spoken of


@dataclass(eq=False)
class _Slot:
    """A worker, and the one that takes its place when it dies.

    Attributes:
        number: counted from 0.
        actor: the process; None where it is not replaced any more.
        awaited: the reference of what it is doing: loading, encoding, or a stream of messages; None where nothing.
        about: None until it is ready.
        runs: begun by the process that runs.
        losses: in a row.
        forwards: of the process that runs.
    """

    number: int
    actor: Any = None
    awaited: Any = None
    about: About | None = None
    runs: int = 0
    losses: int = 0
    forwards: int = 0

    def __str__(self) -> str:
        return f"worker {self.number}" + ("" if self.about is None else f" on {self.about.node}")


class Crew:
    """The workers of one run.

    Args:
        cluster: is open.
        open_work: is called in each worker, and loads its models there.

    Raises:
        ClusterError: from `encode` and `run`: a worker cannot load its models, or all workers were lost too often.
    """

    def __init__(self, cluster: Cluster, open_work: OpenWork) -> None:
        self._ray = import_ray()
        self._cluster = cluster
        self._open_work = open_work
        self._versions = versions()
        self._kind = self._ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy="SPREAD",
        )
        self._slots = [_Slot(number) for number in range(cluster.workers)]
        self._homeless = 0  # workers that were said not to be ready

    def __enter__(self) -> Crew:
        for slot in self._slots:
            self._start(slot)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            self._kill(slot)

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Token ids of prompts, by the first worker that is ready.

        Raises:
            ValueError: a prompt is empty or too long; the message begins with "problems[place]:".
        """
        while True:
            ready = next((slot for slot in self._slots if slot.about is not None), None)
            if ready is None:
                for slot in self._news():
                    self._loaded(slot)
                continue
            try:  # beside its run, where it had one: all that it was given then is finished
                encoded: list[tuple[int, ...]] = self._ray.get(ready.actor.encode.remote(list(prompts)))
                return encoded
            except self._ray.exceptions.RayTaskError as error:
                raise ValueError(_reason(error)) from error
            except self._ray.exceptions.RayError as error:
                self._lost(ready, _reason(error))

    def run(
        self, tasks: Mapping[int, Task], schedule: Schedule, failed: Callable[[Failure], object]
    ) -> Iterator[tuple[int, Any]]:
        """Work on tasks; records are given out as they arrive, each with its index.

        Args:
            tasks: by their places.
            schedule: of these places.
            failed: called with each problem that is given up.
        """
        missing = {place: set(task.wanted) for place, task in tasks.items()}
        while schedule.active:
            for slot in self._slots:
                if slot.about is not None and (places := schedule.next(slot.number)):
                    self._give(slot, [_without(tasks[place], missing[place]) for place in places])
            for slot in self._news():
                if slot.about is None:
                    self._loaded(slot)
                else:
                    yield from self._read(slot, missing, schedule, failed)

    def _give(self, slot: _Slot, tasks: Sequence[Task]) -> None:
        if slot.awaited is not None:
            slot.actor.give.remote(slot.runs, tasks)
            return
        slot.runs += 1
        slot.awaited = slot.actor.run.options(num_returns="streaming").remote(slot.runs, tasks)

    def _read(
        self, slot: _Slot, missing: Mapping[int, set[int]], schedule: Schedule, failed: Callable[[Failure], object]
    ) -> Iterator[tuple[int, Any]]:
        """The records of a worker's next message; or what becomes of its problems where it has none."""
        before = len(schedule.failed)
        try:
            message: Message = self._ray.get(next(slot.awaited))
        except self._ray.exceptions.RayTaskError as error:
            slot.awaited = None
            self._take_back(slot, schedule, _reason(error))
            if not isinstance(error.cause, ValueError | TypeError):  # the models may be in no state to go on
                self._replace(slot)
        except self._ray.exceptions.RayError as error:  # the process died, or its machine with a message
            alone = len(schedule.held(slot.number)) == 1
            self._take_back(slot, schedule, _reason(error))
            if alone:  # which was the problem's fault, then, and not the worker's
                slot.losses = 0
            self._lost(slot, _reason(error))
        else:
            slot.losses = 0
            self._cluster.forward_calls += message.forwards - slot.forwards
            slot.forwards = message.forwards
            for entry in message.entries:
                if isinstance(entry.record, Refusal):
                    schedule.refused(slot.number, entry.place, entry.record.reason)
                    continue
                missing[entry.place].discard(entry.index)
                if not missing[entry.place]:
                    schedule.finished(slot.number, entry.place)
                yield entry.index, entry.record
        for place in list(schedule.failed)[before:]:
            failed(Failure(place, schedule.failed[place]))

    def _take_back(self, slot: _Slot, schedule: Schedule, reason: str) -> None:
        loss = schedule.lost(slot.number, f"{slot}: {reason}")
        fates = (
            (loss.retried, "to be tried again"),
            (loss.failed, f"failed {TRIES} times"),
            (loss.untouched, "not begun"),
        )
        counts = [f"{len(places)} {fate}" for places, fate in fates if places]
        self._cluster.notice(f"{slot}: {reason}" + (f"; problems: {', '.join(counts)}" if counts else ""))

    def _loaded(self, slot: _Slot) -> None:
        """Take note that a worker is ready, or lost. Raises ClusterError where it cannot load its models."""
        reference, slot.awaited = slot.awaited, None
        try:
            slot.about = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise ClusterError(f"{slot}: {_reason(error)}") from error
        except self._ray.exceptions.RayError as error:
            self._cluster.notice(f"{slot}: {_reason(error)} while it loaded its models")
            self._lost(slot, _reason(error))

    def _lost(self, slot: _Slot, reason: str) -> None:
        """Replace a worker that died, unless that has happened too often."""
        slot.losses += 1
        if slot.losses < IN_A_ROW:
            self._replace(slot)
            return
        self._cluster.notice(f"{slot} is not replaced: it was lost {IN_A_ROW} times without a record between")
        self._kill(slot)
        if all(other.actor is None for other in self._slots):
            raise ClusterError(f"every worker was lost {IN_A_ROW} times in a row: {reason}")

    def _replace(self, slot: _Slot) -> None:
        self._kill(slot)
        self._start(slot)

    def _start(self, slot: _Slot) -> None:
        slot.forwards = slot.runs = 0
        slot.actor = self._kind.remote()
        slot.awaited = slot.actor.load.remote(self._open_work, self._versions, self._cluster.gpus_per_worker)

    def _kill(self, slot: _Slot) -> None:
        if slot.actor is not None:
            self._ray.kill(slot.actor)
        slot.actor = slot.awaited = slot.about = None

    def _news(self) -> list[_Slot]:
        """Wait until a worker has something to say. Returns all that have."""
        busy = [slot for slot in self._slots if slot.awaited is not None]
        references = [slot.awaited for slot in busy]
        while True:
            ready, _ = self._ray.wait(references, num_returns=1, timeout=PATIENCE, fetch_local=False)
            if ready:
                break
            homeless = sum(slot.about is None for slot in busy)
            if homeless and homeless != self._homeless:
                self._cluster.notice(f"{homeless} workers are loading, or wait for a machine with room for them")
            self._homeless = homeless
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        names = {id(reference) for reference in ready}
        return [slot for slot in busy if id(slot.awaited) in names]


def _without(task: Task, missing: set[int]) -> Task:
    """The task without the records that have come already."""
    return Task(task.place, tuple(index for index in task.wanted if index in missing), task.content)


def _reason(error: Any) -> str:
    """Return what happened, on one line."""
    cause = getattr(error, "cause", None)
    if cause is not None:  # an exception in the worker
        text = " ".join(str(cause).split())
        return text if isinstance(cause, ValueError | OSError | ImportError) else f"{type(cause).__name__}: {text}"
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = " ".join(filter(None, lines)) or type(error).__name__
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text)
    return f"died ({detail[1].rstrip('. ') if detail else text})"
