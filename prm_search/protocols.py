"""Policy and Scorer: all that the driver knows of models. The policies' half is in policy.py."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from .drawing import Segment, commit
from .policy import AsyncPolicy, AsyncPolicyBase, BlockingPolicy, Policy, PolicyBase
from .sampling import Request, Sampling
from .tree import Node, SearchTree

__all__ = [
    "AsyncPolicy", "AsyncPolicyBase", "BlockingPolicy", "Policy", "PolicyBase", "Request", "Sampling", "Scorer",
    "Segment", "commit",
]  # fmt: skip


@runtime_checkable
class Scorer(Protocol):
    """Fills nodes' rewards."""

    @property
    def name(self) -> str:
        """Key of its rewards in Node.rewards."""
        ...

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Its models' ids by role ("prm", "reference"), for usage."""
        ...

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score these nodes and their unscored ancestors, through Node.set_rewards. Nodes may belong to
        different trees; nodes it has scored already cost nothing."""
        ...

    def release(self, tree: SearchTree) -> None:
        """Forget a tree and free its KV."""
        ...
