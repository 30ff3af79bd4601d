"""The race: what fell clearly behind on a part of the problems is not tried on the rest. No model, no clock.

It is a paired race (Maron and Moore 1994; F-Race, Birattari et al. 2002) with the exact sign test in place of their
bounds, judged after a quarter, a half and three quarters of the problems. A verdict reads the records of all problems
up to there and nothing else. So their order, and the workers that made them, change nothing; a run that goes on comes
to it again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import sign_test
from .confirm import Line, lines_of
from .pick import Table, best, edges_of, may_be_a_bins
from .trials import Trial

STAGES = (0.25, 0.5, 0.75)  # of the problems
P = 0.01  # of the two-sided sign test
FEWEST = 8  # problems of which the test can tell anything: eight to none has p = 1/128


@dataclass(frozen=True)
class Dropped:
    """A trial that is not tried any more.

    Attributes:
        trial: its number.
        problems: the first so many were tried.
    """

    trial: int
    problems: int


@dataclass(frozen=True)
class Standing:
    """The state of a race.

    Attributes:
        trials: numbers of those that are still in it.
        dropped: the others.
        missing: indices of the records that the next verdict needs; none where the race is over.
        left: records that are missing until the end, if nothing more is dropped.
    """

    trials: tuple[int, ...]
    dropped: tuple[Dropped, ...]
    missing: tuple[int, ...]
    left: int


@dataclass(frozen=True)
class Race:
    """The rules of a race.

    A trial is dropped where each of its configs is behind: its leader, the best of those that cost no more, is right
    where it is wrong more often than the reverse, with p of at most P. With bins it must also be right no more often
    than the leader in any bin of difficulty, since a bin could choose it. Whole samples are never dropped.

    Args:
        trials: what is tried, in order.
        problems: how many there are.
        bins: of difficulty; 1 for none.
        cost: of pick.COSTS, which the budget limits. Of tokens it is what a config was made for, of seconds its mean.
        on: False to drop nothing.
    """

    trials: Sequence[Trial]
    problems: int
    bins: int
    cost: str = "policy_tokens"
    on: bool = True

    @property
    def ends(self) -> list[int]:
        """Numbers of problems after which is judged, and the number of all."""
        stages = [math.ceil(share * self.problems) for share in STAGES if self.on]
        return sorted({*(end for end in stages if end >= FEWEST), self.problems})

    def standing(self, records: Mapping[int, Mapping[str, Any]], left_out: Collection[int] = ()) -> Standing:
        """The state by the records that there are.

        Args:
            records: by their indices; those of later problems, and of dropped trials, are not looked at.
            left_out: places of problems that failed.
        """
        alive, dropped = tuple(range(len(self.trials))), list[Dropped]()
        for end in self.ends:
            missing = self._missing(records, alive, end, left_out)
            if missing or end == self.problems:
                left = self._missing(records, alive, self.problems, left_out)
                return Standing(alive, tuple(dropped), tuple(missing), len(left))
            losers = self._losers(records, alive, end, left_out)
            dropped += [Dropped(trial, end) for trial in sorted(losers)]
            alive = tuple(trial for trial in alive if trial not in losers)
        raise AssertionError("the last end is that of all problems")

    def _missing(
        self, records: Mapping[int, Any], alive: Sequence[int], end: int, left_out: Collection[int]
    ) -> list[int]:
        places = [place for place in range(end) if place not in left_out]
        indices = (trial * self.problems + place for trial in alive for place in places)
        return [index for index in indices if index not in records]

    def table(
        self,
        records: Mapping[int, Mapping[str, Any]],
        trials: Sequence[int],
        left_out: Collection[int] = (),
        end: int | None = None,
    ) -> Table:
        """The outcomes of these trials on the problems, or the first of them. Raises ValueError as Table.of."""
        beyond = range(self.problems if end is None else end, self.problems)
        return Table.of(self.trials, records.values(), self.problems, {*left_out, *beyond}, numbers=trials)

    def dropped_lines(
        self, records: Mapping[int, Mapping[str, Any]], left_out: Collection[int] = ()
    ) -> list[tuple[int, Line]]:
        """The figures of dropped configs, each behind the number of problems that it was tried on."""
        lines = []
        for each in self.standing(records, left_out).dropped:
            table = self.table(records, [each.trial], left_out, each.problems)
            lines += [(table.right.shape[1], line) for line in lines_of(table)]
        return lines

    def _losers(
        self, records: Mapping[int, Mapping[str, Any]], alive: Sequence[int], end: int, left_out: Collection[int]
    ) -> set[int]:
        if all(place in left_out for place in range(end)):
            return set()
        table = self.table(records, alive, left_out, end)
        owners = [trial for trial in alive for _ in self.trials[trial].configs]
        price = np.array([config.tokens for config in table.configs], np.float64)
        if self.cost != "policy_tokens":
            price = table.cost(self.cost)
        behind = [self._behind(table, price, place) for place in range(len(owners))]
        kept = {owner for owner, lost in zip(owners, behind, strict=True) if not lost}
        return {trial for trial in alive if trial not in kept and not self.trials[trial].whole}

    def _behind(self, table: Table, price: np.ndarray, place: int) -> bool:
        own = table.right[place]
        leader = table.right[best(table, np.flatnonzero(price <= price[place]).tolist(), self.cost)]
        if own.sum() >= leader.sum() or sign_test(own.tolist(), leader.tolist()) > P:
            return False
        config = table.configs[place]
        if self.bins == 1 or not may_be_a_bins(config):
            return True
        difficulty = table.difficulty[str(config.scorer), str(config.value)]
        members = np.searchsorted(edges_of(difficulty, self.bins), difficulty, side="right")
        return all(own[members == number].sum() <= leader[members == number].sum() for number in range(self.bins))
