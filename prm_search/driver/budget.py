"""Budgets: what a search may spend, and how an Expand's children share what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import number


@dataclass(frozen=True)
class Budget:
    """Limits of one prompt's search; None means unlimited. Where one bites, nodes end with finish "budget".

    Args:
        tokens: sampled tokens, rollouts and pruned steps included. Never exceeded.
        nodes: nodes below the root, after merging. Never exceeded.
        depth: steps of a path. Never exceeded.
        seconds: wall time since the search began; checked between forwards.

    Raises:
        ValueError: a limit is not positive, or not an integer (seconds: not finite).
        TypeError: seconds is not a number.
    """

    tokens: int | None = None
    nodes: int | None = None
    depth: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "nodes", "depth"):
            limit = getattr(self, name)
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise ValueError(f"budget: {name}={limit!r}: an integer >= 1 or None is needed")
        if self.seconds is not None:
            number("budget: seconds", self.seconds, "a finite number > 0 or None", lambda x: 0 < x < math.inf)

    @classmethod
    def of(cls, given: Budget | int | None) -> Budget:
        """A Budget from what users pass; an integer limits the sampled tokens. Raises TypeError for anything else."""
        if given is None or isinstance(given, Budget):
            return given or cls()
        if isinstance(given, int):
            return cls(tokens=given)
        raise TypeError(f"budget must be a Budget, an int (sampled tokens) or None, got {type(given).__name__}")


@dataclass
class Purse:
    """A run's remaining budget; None is without limit. Promised amounts leave it at once, the rest comes back."""

    tokens: int | None = None
    nodes: int | None = None

    def split(self, parts: int) -> list[Purse]:
        """Even shares, remainders to the first; this purse is empty until they are put back."""
        tokens, nodes = share(self.tokens, parts), share(self.nodes, parts)
        self.tokens = None if self.tokens is None else 0
        self.nodes = None if self.nodes is None else 0
        return [Purse(*pair) for pair in zip(tokens, nodes, strict=True)]

    def put_back(self, shares: Sequence[Purse]) -> None:
        """Take back what shares have left."""
        self.tokens = None if self.tokens is None else self.tokens + sum(part.tokens or 0 for part in shares)
        self.nodes = None if self.nodes is None else self.nodes + sum(part.nodes or 0 for part in shares)

    def promise(self, children: int) -> list[int | None]:
        """Set aside tokens (and a node each) for as many of these children as it can.

        Returns:
            The token cap (>= 1, or None) of each child that may be drawn, first children first.
        """
        if self.nodes is not None:
            children = min(children, self.nodes)
        if self.tokens is not None:
            children = min(children, self.tokens)
        caps = share(self.tokens, children)
        self.spend(sum(cap or 0 for cap in caps), len(caps))
        return caps

    def spend(self, tokens: int, nodes: int) -> None:
        """Take amounts out, or put unused ones back where they are negative."""
        self.tokens = None if self.tokens is None else self.tokens - tokens
        self.nodes = None if self.nodes is None else self.nodes - nodes


def share(amount: int | None, parts: int) -> list[int | None]:
    """An amount in even parts, remainders to the first."""
    if amount is None:
        return [None] * parts
    if parts == 0:
        return []
    portion, over = divmod(amount, parts)
    return [portion + (part < over) for part in range(parts)]
