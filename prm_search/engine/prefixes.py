"""Prefixes: token sequences by their beginnings, for caches that encode a common beginning once. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefixes(Generic[T]):
    """Token sequences, each with a value, found by the longest beginning that a new one shares with any of them."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, ...]] = []
        self._values: dict[tuple[int, ...], T] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def get(self, ids: tuple[int, ...]) -> T | None:
        """Return the value of this very sequence, or None."""
        return self._values.get(ids)

    def add(self, ids: tuple[int, ...], value: T) -> None:
        """Add a sequence, or give it another value."""
        if ids not in self._values:
            self._sorted.insert(bisect_left(self._sorted, ids), ids)
        self._values[ids] = value

    def nearest(self, ids: tuple[int, ...]) -> tuple[int, T | None]:
        """Return how many first tokens `ids` shares with one of the sequences at most, and the value of that one.

        (0, None) where none begins as it does.
        """
        at = bisect_left(self._sorted, ids)
        best, value = 0, None
        for other in self._sorted[max(at - 1, 0) : at + 1]:  # in sorted order the nearest stands beside it
            shared = common(ids, other)
            if shared > best:
                best, value = shared, self._values[other]
        return best, value

    def values(self) -> list[T]:
        """Return every value, in the order in which its sequence came."""
        return list(self._values.values())


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)
