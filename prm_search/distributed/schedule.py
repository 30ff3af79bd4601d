"""Schedule: which problems a worker gets next, and what becomes of them when it dies. No Ray, no clock, no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt

from ..checks import count

TRIES = 3


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
    """Hands problems out as workers have room, and takes those of a lost worker back.

    A worker holds up to `batch` problems under way and `ahead` that wait behind them, so that it does not wait for the
    driver. Towards the end it holds its share of what is left, at most: workers finish together.

    A worker begins its problems in order, so the first `batch` unfinished ones may have been what killed it. Each of
    these has used a try. They go out again in groups of about the square root of their number, and a last time alone,
    each time to a worker that has nothing else: a problem that kills workers fails by itself. (A death takes the
    records of the worker's last moments along. A problem that was begun in those may use no try.)

    Args:
        places: the problems, each by its number, in the order in which they are handed out.
        workers: how many there are.
        batch: problems that a worker has under way at once.
        ahead: None for `batch`.

    Attributes:
        failed: problems that used all tries, each with the reason of its last loss.

    Raises:
        ValueError, TypeError: a number is below 1, or a problem stands twice.
    """

    def __init__(self, places: Iterable[int], *, workers: int, batch: int, ahead: int | None = None) -> None:
        ahead = batch if ahead is None else ahead
        for name, value in (("workers", workers), ("batch", batch), ("ahead", ahead)):
            count(name, value)
        self._workers, self._batch, self._ahead = workers, batch, ahead
        self._fresh = deque(places)
        self._again: deque[tuple[int, ...]] = deque()
        self._held: dict[int, dict[int, None]] = {}  # worker -> its unfinished problems, in order
        self._alone: set[int] = set()  # workers that have a group of `_again`, and get nothing beside it
        self._losses: dict[int, int] = {}
        self._left = len(self._fresh)  # problems that have neither finished nor failed
        self.failed: dict[int, str] = {}
        if len(set(self._fresh)) < self._left:
            raise ValueError("places: a problem stands in the list twice")

    @property
    def active(self) -> bool:
        """Return True if problems wait, or workers have some."""
        return self._left > 0

    @property
    def waiting(self) -> int:
        """Problems that no worker has."""
        return len(self._fresh) + sum(map(len, self._again))

    def held(self, worker: int) -> tuple[int, ...]:
        """Return what a worker has not finished."""
        return tuple(self._held.get(worker, ()))

    def next(self, worker: int) -> tuple[int, ...]:
        """Further problems for a worker; empty where it has enough, or none wait for it."""
        held = self._held.get(worker, {})
        if not held and self._again:
            self._alone.add(worker)
            return self._give(worker, self._again.popleft())
        share = max(1, ceil(self._left / self._workers))
        room = min(self._batch + self._ahead, share) - len(held)
        if worker in self._alone or room <= 0 or (len(held) >= self._batch and 2 * room < self._ahead):
            return ()
        return self._give(worker, [self._fresh.popleft() for _ in range(min(room, len(self._fresh)))])

    def _give(self, worker: int, places: Sequence[int]) -> tuple[int, ...]:
        if places:
            self._held.setdefault(worker, {}).update(dict.fromkeys(places))
        return tuple(places)

    def finished(self, worker: int, place: int) -> None:
        """One of a worker's problems is finished. Raises KeyError where it has no such problem."""
        held = self._held[worker]
        del held[place]
        self._left -= 1
        if not held:
            del self._held[worker]
            self._alone.discard(worker)

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
        self._alone.discard(worker)
        suspects, untouched = unfinished[: self._batch], unfinished[self._batch :]
        self._fresh.extendleft(reversed(untouched))
        again: dict[int, list[int]] = {}
        failed = []
        for place in suspects:
            losses = self._losses[place] = self._losses.get(place, 0) + 1
            if losses == TRIES:
                self.failed[place] = reason
                failed.append(place)
                self._left -= 1
            else:
                again.setdefault(losses, []).append(place)
        for losses, places in again.items():
            size = 1 if losses == TRIES - 1 else max(1, isqrt(len(places)))
            self._again.extend(_cut(places, size))
        return Loss(tuple(place for places in again.values() for place in places), tuple(failed), untouched)


def _cut(places: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(places[first : first + size]) for first in range(0, len(places), size)]
