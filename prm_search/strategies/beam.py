"""Step-level beam search under the reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..checks import flag
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct


@dataclass(frozen=True)
class Beam:
    """Keep the `width` best prefixes, each continued by `expansions` steps.

    The root gets width * expansions children. Unfinished and finished answers compete for the slots by value. A
    finished answer holds its slot until better ones take it, and stays a candidate even then. The search ends when no
    slot is unfinished. Ties keep the order in which they were drawn. With expansions=1 nothing is ever pruned, and the
    search is BestOfN(width).

    Args:
        width: slots.
        expansions: children of each kept slot.
        per_parent: at most so many slots for the continuations of one prefix (diversity), except that no slot is
            left empty for it; None for no limit. The root's children are exempt.
        merge: count equal children on one node, which then fills as many slots as it was drawn times. It changes
            nothing but the number of nodes: the same tokens are drawn and the same answers are chosen.
        value: what to rank by; None for q.

    Raises:
        ValueError: a number is below 1, or no value has this name.
    """

    width: int = 4
    expansions: int = 4
    per_parent: int | None = None
    merge: bool = True
    value: Value | str | None = None

    def __post_init__(self) -> None:
        flag("merge", self.merge)
        at_least("width", self.width)
        at_least("expansions", self.expansions)
        if self.per_parent is not None:
            at_least("per_parent", self.per_parent)
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        slots = Slots(self.width, self.per_parent)
        drawn = yield Expand([root], self.width * self.expansions, merge=self.merge, alive=[root])
        while live := slots.select(drawn):
            drawn = yield Expand(live, self.expansions, merge=self.merge, alive=live)
        return distinct(slots.finished)


@dataclass
class Slots:
    """The selection that Beam and Lookahead share.

    Attributes:
        finished: every finished node that was ever offered, in order.
    """

    width: int
    per_parent: int | None = None
    finished: list[Node] = field(default_factory=list)
    _held: list[Node] = field(default_factory=list)
    _prefix: dict[Node, int] = field(default_factory=dict)
    _numbers: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)

    def select(self, drawn: Sequence[Node]) -> list[Node]:
        """Let the drawn nodes and the finished ones that hold a slot compete; returns the unfinished winners."""
        self.finished += [node for node in drawn if node.finished]
        kept = self._best([*self._held, *drawn])
        self._held = [node for node in kept if node.finished]
        return [node for node in kept if not node.finished]

    def _best(self, offered: Sequence[Node]) -> list[Node]:
        ranked = sorted(offered, key=lambda node: -value_of(node))  # stable: ties stay in draw order
        if self.per_parent is None:
            return ranked[: self.width]
        within: list[int] = []
        beyond: list[int] = []
        taken: Counter[int] = Counter()
        for rank, node in enumerate(ranked):
            prefix = 0 if node.parent is None else self._number(node.parent)
            taken[prefix] += 1
            (within if prefix == 0 or taken[prefix] <= self.per_parent else beyond).append(rank)
        return [ranked[rank] for rank in sorted([*within, *beyond][: self.width])]

    def _number(self, node: Node) -> int:
        """One number for all nodes that end the same prefix, merged into one node or not; 0 for the root."""
        if node.parent is None:
            return 0
        if node not in self._prefix:
            key = (self._number(node.parent), node.token_ids)
            self._prefix[node] = self._numbers.setdefault(key, len(self._numbers) + 1)
        return self._prefix[node]


def value_of(node: Node) -> float:
    """A scored node's value. Raises ValueError where the driver has not set it."""
    if node.value is None:
        raise ValueError(f"{node!r} has no value: only nodes that a driver has scored can be ranked")
    return node.value
