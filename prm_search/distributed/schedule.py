"""Schedule: which problems a worker gets next, and what becomes of them when it dies. No Ray, no clock, no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt

from ..checks import count

TRIES = 3
DEPTH = 4  # batches in the largest chunk


@dataclass(frozen=True)
class Loss:
    """The fate of the problems that a worker had not finished when it was lost.

    Attributes:
        retried: get another worker.
        failed: had their last try.
        untouched: were not begun; no try is counted.
    """

    retried: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    untouched: tuple[int, ...] = ()


class Schedule:
    """Hands problems out in chunks, and takes those of a lost worker back.

    Chunks shrink towards the end, so that workers finish together: a chunk is the waiting problems over twice the
    workers, at most `largest` (guided self-scheduling, Polychronopoulos and Kuck 1987).

    A worker begins the problems of a chunk in order and has at most `batch` under way, so the first `batch` unfinished
    ones may have been what killed it. Each of these has used a try. They go out again in groups of about the square
    root of their number, and a last time alone, so a problem that kills workers fails by itself.

    Args:
        places: the problems, each by its number, in the order in which they are handed out.
        workers: how many there are.
        batch: problems that a worker has under way at once.
        largest: problems of a chunk at most; None for `DEPTH` batches.

    Attributes:
        failed: problems that used all tries, each with the reason of its last loss.

    Raises:
        ValueError, TypeError: a number is below 1, or a problem stands twice.
    """

    def __init__(self, places: Iterable[int], *, workers: int, batch: int, largest: int | None = None) -> None:
        largest = batch * DEPTH if largest is None else largest
        for name, value in (("workers", workers), ("batch", batch), ("largest", largest)):
            count(name, value)
        self._workers, self._batch, self._largest = workers, batch, largest
        self._fresh = deque(places)
        self._again: deque[tuple[int, ...]] = deque()
        self._held: dict[int, dict[int, None]] = {}  # worker -> its unfinished problems, in order
        self._losses: dict[int, int] = {}
        self.failed: dict[int, str] = {}
        if len(set(self._fresh)) < len(self._fresh):
            raise ValueError("places: a problem stands in the list twice")

    @property
    def active(self) -> bool:
        """Return True if problems wait, or workers have some."""
        return bool(self._fresh or self._again or self._held)

    @property
    def waiting(self) -> int:
        """Problems that no worker has."""
        return len(self._fresh) + sum(map(len, self._again))

    def held(self, worker: int) -> tuple[int, ...]:
        """Return what a worker has not finished."""
        return tuple(self._held.get(worker, ()))

    def next(self, worker: int) -> tuple[int, ...]:
        """A chunk for a worker that has none; empty where nothing waits.

        Raises:
            ValueError: it has one already.
        """
        if worker in self._held:
            raise ValueError(f"worker={worker!r} has {len(self._held[worker])} problems already")
        if self._again:
            chunk = self._again.popleft()
        else:
            size = min(self._largest, max(1, ceil(len(self._fresh) / (2 * self._workers))), len(self._fresh))
            chunk = tuple(self._fresh.popleft() for _ in range(size))
        if chunk:
            self._held[worker] = dict.fromkeys(chunk)
        return chunk

    def finished(self, worker: int, place: int) -> None:
        """One of a worker's problems is finished. Raises KeyError where it has no such problem."""
        held = self._held[worker]
        del held[place]
        if not held:
            del self._held[worker]

    def refused(self, worker: int, place: int, reason: str) -> None:
        """One of a worker's problems cannot be done by any worker: it fails at once. Raises KeyError as `finished`."""
        self.finished(worker, place)
        self.failed[place] = reason

    def lost(self, worker: int, reason: str) -> Loss:
        """Take back what a worker had, since it died or gave up.

        Args:
            worker: may have had nothing.
            reason: kept with the problems that fail.
        """
        unfinished = self.held(worker)
        self._held.pop(worker, None)
        suspects, untouched = unfinished[: self._batch], unfinished[self._batch :]
        self._fresh.extendleft(reversed(untouched))
        again: dict[int, list[int]] = {}
        failed = []
        for place in suspects:
            losses = self._losses[place] = self._losses.get(place, 0) + 1
            if losses == TRIES:
                self.failed[place] = reason
                failed.append(place)
            else:
                again.setdefault(losses, []).append(place)
        for losses, places in again.items():
            size = 1 if losses == TRIES - 1 else max(1, isqrt(len(places)))
            self._again.extend(_cut(places, size))
        return Loss(tuple(place for places in again.values() for place in places), tuple(failed), untouched)


def _cut(places: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(places[first : first + size]) for first in range(0, len(places), size)]
