"""A static slot table: the branch in each line, and the lines that have to be written anew."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..kv_tree import Branch
from ..waves import stem_of


class _Held(NamedTuple):
    """The content of a line: a branch's path of `length` slots, as it was at that epoch."""

    branch: weakref.ref[Branch]
    epoch: int
    length: int


class SlotTable:
    """The host's knowledge of a slot table on a device, in which every branch of a step has a line.

    A branch keeps its line from step to step. A line whose branch has grown by one token since is appended to on the
    device; any other line (a new branch, a branch that was evicted or rolled back in between) is written anew.

    Args:
        count: lines of the table.
    """

    def __init__(self, count: int) -> None:
        self._held: list[_Held | None] = [None] * count
        self._line: dict[int, int] = {}  # id of a branch -> its line

    def forget(self) -> None:
        """Nothing on the device is known any more."""
        self._held = [None] * len(self._held)
        self._line.clear()

    def assign(self, branches: Sequence[Branch], bucket: int, *, shares_prefixes: bool) -> tuple[np.ndarray, list[int]]:
        """A line for each branch, below `bucket`.

        Args:
            branches: at most `bucket`, each with the slot of its newest token.
            bucket: lines that the step takes in.
            shares_prefixes: siblings shall stand in neighbouring lines, as far as that is worth moving them.

        Returns:
            lines [B] int64, and the indices of the branches whose lines have to be written.
        """
        lines = self._keep(branches, bucket)
        if shares_prefixes and self._runs(branches, lines) > 1 + 1.5 * len({stem_of(branch) for branch in branches}):
            order = sorted(range(len(branches)), key=lambda i: stem_of(branches[i]))
            lines = np.empty(len(branches), np.int64)
            lines[order] = np.arange(len(branches))
        dirty, held = [], self._held
        self._held, self._line = [None] * len(held), {}
        for i, (branch, line) in enumerate(zip(branches, lines.tolist(), strict=True)):
            length, before = branch.start + branch.encoded, held[line]
            known = before is not None and before.branch() is branch and before.epoch == branch.epoch
            if not known or before is None or before.length != length - 1:
                dirty.append(i)
            self._held[line] = _Held(weakref.ref(branch), branch.epoch, length)
            self._line[id(branch)] = line
        return lines, dirty

    def _keep(self, branches: Sequence[Branch], bucket: int) -> np.ndarray:
        """The lines that branches have, and free ones for the others, siblings one after the other."""
        lines = np.full(len(branches), -1, np.int64)
        for i, branch in enumerate(branches):
            line = self._line.get(id(branch), bucket)
            held = self._held[line] if line < bucket else None
            if held is not None and held.branch() is branch:
                lines[i] = line
        taken = set(lines.tolist())
        free = (line for line in range(bucket) if line not in taken)
        for i in sorted(np.flatnonzero(lines < 0).tolist(), key=lambda i: stem_of(branches[i])):
            lines[i] = next(free)
        return lines

    @staticmethod
    def _runs(branches: Sequence[Branch], lines: np.ndarray) -> int:
        stems = [stem_of(branches[i]) for i in np.argsort(lines)]
        return 1 + sum(a != b for a, b in pairwise(stems))


def families(branches: Sequence[Branch], lines: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Neighbouring lines whose paths begin with the same slots.

    Args:
        branches, lines: as Lines.assign.
        room: families that there is room for.

    Returns:
        the first line of each family [F], the first of them 0, and how many slots each branch shares with its family
        [B] (0 for a branch alone); None where there are more than `room`.
    """
    order = np.argsort(lines)
    stems = [stem_of(branches[i]) for i in order]
    starts = [at for at in range(len(order)) if at == 0 or stems[at] != stems[at - 1]]
    shared = np.zeros(len(branches), np.int64)
    for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
        if end - begin > 1:
            for i in order[begin:end]:
                shared[i] = branches[i].start
    first = lines[order][starts]
    if first[0]:  # lines without a branch come first: they share nothing
        first = np.concatenate(([0], first))
    return None if len(first) > room else (first, shared)
