"""A strategy for each difficulty, told by the first few samples."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..checks import number
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, Strategy, at_least, distinct
from .beam import Beam, value_of
from .steer import Steer


@dataclass(frozen=True)
class ByDifficulty:
    """Draw a few whole answers, tell from their values how hard the problem is, and go on with that bin's strategy.

    The estimate is the mean value of `probe` whole answers, as in compute-optimal scaling, where it is the mean score
    of many (C. Snell et al., "Scaling LLM Test-Time Compute Optimally", arXiv 2408.03314, section 3.2,
    "model-predicted difficulty"); `prm-search tune` finds thresholds and strategies. Nothing drawn is lost: answers of
    the probe are candidates, and where the strategy begins with children of the root, the probe's answers (or their
    first steps) are the first of them. A strategy of independent runs, as DVTS, draws all of its own.

    Args:
        probe: whole answers that tell the difficulty.
        thresholds: of their mean value, rising; in the unit of the values.
        strategies: one more than thresholds, for the hardest problems (the lowest values) first. Their nodes are ranked
            by this strategy's value: they name none of their own.
        value: what all of them rank by; None for what the search ranks by.

    Raises:
        ValueError: a number is out of range, thresholds do not rise, there are too many or too few strategies, one
            names a value, or no value has this name.
        TypeError: one of them is no strategy.
    """

    probe: int = 4
    thresholds: Sequence[float] = ()
    strategies: Sequence[Strategy] = (Beam(),)
    value: Value | str | None = None

    def __post_init__(self) -> None:
        at_least("probe", self.probe)
        for name in ("thresholds", "strategies"):
            if isinstance(getattr(self, name), str) or not isinstance(getattr(self, name), Sequence):
                raise TypeError(f"{name} must be a list, got {type(getattr(self, name)).__name__}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for threshold in self.thresholds:
            number("thresholds", threshold, "finite numbers", math.isfinite)
        if sorted(set(self.thresholds)) != list(self.thresholds):
            raise ValueError(f"thresholds={list(self.thresholds)!r}: each has to be above the one before it")
        if len(self.strategies) != len(self.thresholds) + 1:
            raise ValueError(
                f"strategies: {len(self.strategies)} for {len(self.thresholds)} thresholds: one more is needed"
            )
        for strategy in self.strategies:
            _check(strategy)
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        ends = yield Expand([root], self.probe, until="end", merge=False, alive=[root])
        if not ends:
            return []  # the budget let the root have no child
        difficulty = fmean(value_of(end) for end in ends)
        strategy = self.strategies[bisect_right(self.thresholds, difficulty)]
        candidates = yield from _going_on(strategy.run(root), root, ends)
        return distinct([*(end for end in ends if end.finished), *candidates])


def _check(strategy: object) -> None:
    """Raises TypeError or ValueError where a bin's strategy cannot run in another's place."""
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise TypeError(f"strategies: configured strategies such as Beam(4, 4) are needed, got {strategy!r:.80}")
    if isinstance(strategy, Steer | ByDifficulty):
        raise ValueError(f"strategies: {type(strategy).__name__} cannot be a bin: it needs a search of its own")
    if getattr(strategy, "value", None) is not None:
        raise ValueError(f"strategies: {strategy!r} names a value: all are ranked by that of ByDifficulty")


def _going_on(run: Run, root: Node, ends: Sequence[Node]) -> Run:
    """Run a strategy whose first children of the root are there already, as far as these answers go."""
    try:
        ask = next(run)
        if isinstance(ask, Expand) and list(ask.nodes) == [root] and not (ask.greedy or ask.rollout):
            n = ask.n if isinstance(ask.n, int) else sum(ask.n)
            there = [end if ask.until == "end" else end.path()[0] for end in ends[:n]]
            message = [*there, *((yield replace(ask, n=n - len(there))) if n > len(there) else [])]
        else:
            message = yield ask
        while True:
            message = yield run.send(message)
    except StopIteration as stop:
        candidates: list[Node] = stop.value
        return candidates
    finally:
        run.close()
