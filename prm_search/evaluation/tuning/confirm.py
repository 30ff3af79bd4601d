"""The confirmation: what was picked, and plain best-of-N, on problems that nothing was chosen on. No model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...strategies import BestOfN
from ..statistics import Comparison, paired_bootstrap, wilson
from .pick import COSTS, Pick, Table, affordable, baseline, pick_within
from .trials import Config, Scale, Trial

LEVEL = 0.05  # of p, at which something beats plain best-of-N


@dataclass(frozen=True)
class Limit:
    """A budget of a problem: sampled tokens, or seconds."""

    tokens: int | None = None
    seconds: float | None = None

    @property
    def title(self) -> str:
        """Return what tables call it."""
        return f"{self.tokens} tokens" if self.seconds is None else f"{self.seconds:g} seconds"

    @property
    def cost(self) -> str:
        """Return the cost that it limits, of pick.COSTS."""
        return "policy_tokens" if self.seconds is None else "seconds"


@dataclass(frozen=True)
class Contest:
    """The contestants for one budget.

    Attributes:
        limit: the budget.
        plain: best-of-N.
        pick: what was picked.
        judged: shares of right answers in cross-validation; see pick.
    """

    limit: Limit
    plain: Config
    pick: Pick
    judged: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """A config's figures on the held-out problems.

    Attributes:
        config: which.
        accuracy, low, high: share of right answers, and Wilson's 95 % interval.
        costs: name of pick.COSTS -> mean of a problem.
    """

    config: Config
    accuracy: float
    low: float
    high: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a contest.

    Attributes:
        contest: which.
        plain, picked: their figures.
        comparison: picked minus plain, paired.
        beats: whether the picked one is better: its interval is above 0, and p at most LEVEL.
    """

    contest: Contest
    plain: Line
    picked: Line
    comparison: Comparison
    beats: bool

    @property
    def chosen(self) -> Config:
        """Return what the guidance file says: plain best-of-N where nothing beats it."""
        return self.picked.config if self.beats else self.plain.config

    @property
    def sentence(self) -> str:
        """The verdict in words, with its interval."""
        c = self.comparison
        gap = f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}] on {c.problems} held-out problems, p = {c.p:.3f}"
        if self.beats:
            return f"{self.contest.limit.title}: {self.picked.config.title()} beats plain best-of-N by {gap}"
        if self.contest.pick.config == self.contest.plain:
            return f"{self.contest.limit.title}: nothing that was tried beats plain best-of-N"
        return f"{self.contest.limit.title}: nothing beats plain best-of-N: the best found differs by {gap}"


def contests(table: Table, scale: Scale, limits: Sequence[Limit], *, bins: int) -> list[Contest]:
    """The contests to be held. Raises ValueError where a budget does not pay for one whole sample."""
    found = []
    for limit in limits:
        choice, judged = pick_within(table, scale, tokens=limit.tokens, seconds=limit.seconds, bins=bins)
        places = affordable(table, tokens=limit.tokens, seconds=limit.seconds)
        plain = table.configs[baseline(table, places, limit.cost)]
        found.append(Contest(limit, plain, choice, judged))
    return found


def confirming(found: Sequence[Contest]) -> list[Trial]:
    """The trials that show how the contestants do: whole samples are drawn once for all that choose among them."""
    configs = list(dict.fromkeys(config for one in found for config in (one.plain, one.pick.config)))
    whole = tuple(config for config in configs if isinstance(config.strategy, BestOfN))
    most = BestOfN(max(config.strategy.n for config in whole))  # type: ignore[attr-defined]
    searched = [config for config in configs if config not in whole]
    return [
        Trial(most, None, None, None, whole),
        *(Trial(one.strategy, one.scorer, one.value, one.tokens, (one,)) for one in searched),
    ]


def verdicts(
    found: Sequence[Contest],
    trials: Sequence[Trial],
    records: Iterable[Mapping[str, Any]],
    problems: int,
    left_out: Collection[int] = (),
) -> list[Verdict]:
    """The outcome of every contest, from the records of `confirming`'s trials; see Table.of."""
    table = Table.of(trials, records, problems, left_out)
    lines = {config: _line(table, place) for place, config in enumerate(table.configs)}
    judged = []
    for contest in found:
        plain, picked = (table.configs.index(config) for config in (contest.plain, contest.pick.config))
        comparison = paired_bootstrap(table.right[picked].astype(float), table.right[plain].astype(float))
        judged.append(
            Verdict(
                contest,
                lines[contest.plain],
                lines[contest.pick.config],
                comparison,
                comparison.low > 0 and comparison.p <= LEVEL,
            )
        )
    return judged


def _line(table: Table, place: int) -> Line:
    right = table.right[place]
    low, high = wilson(int(right.sum()), len(right))
    costs = {name: float(table.costs[name][place].mean()) for name in COSTS}
    return Line(table.configs[place], float(right.mean()), low, high, costs)


def lines_of(table: Table) -> list[Line]:
    """The figures of every config."""
    return [_line(table, place) for place in range(len(table.configs))]
