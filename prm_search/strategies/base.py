"""What a strategy may ask for. A strategy is a frozen config whose `run` is a generator: it yields requests,
gets the scored children back, and returns its candidates. It never sees a model, a budget or a batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from ..tree import Node


@dataclass(frozen=True)
class Expand:
    """Draw children for each of these nodes; the driver sends back the flat list of scored children, by node.

    A node that the budget or the length lets no more children have is finished by the driver and sent back in
    its own place, so a strategy meets budgets only as finished nodes. Merged duplicates appear once.

    Args:
        nodes: unfinished nodes of one tree.
        n: children for each lineage of a node (one number, or one a node).
        until: "step" draws one step; "end" goes on to the end of the response, still cut into steps, and sends
            back the last node of each chain.
        copies: how many of each node's lineages to continue (default: all, `node.count`); a selection that has
            room for only some of a merged node's duplicates says so here.
        rollout: mark the children as rollouts (see Node.rollout).
    """

    nodes: Sequence[Node]
    n: int | Sequence[int] = 1
    until: Literal["step", "end"] = "step"
    copies: Sequence[int] | None = None
    rollout: bool = False


@dataclass(frozen=True)
class Parallel:
    """Independent sub-searches of one tree; the driver sends back the list of their results, in order.

    What is left of a token or node budget is split evenly between them (remainders to the first), so that none
    depends on how fast another runs; what a run leaves over goes back when all have ended.
    """

    runs: Sequence[Run]


Run = Generator[Expand | Parallel, Any, list[Node]]


@runtime_checkable
class Strategy(Protocol):
    """The object is config; the caller owns all state."""

    def run(self, root: Node) -> Run:
        """Search below root. Yields Expand (gets list[Node]) or Parallel (gets list[list[Node]]) and returns the
        candidates: finished nodes, in an order that depends on the draws alone."""
        ...
