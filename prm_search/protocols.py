"""Policy and Scorer: all that the driver knows of models. The policies' half is in policy.py."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from .drawing import Segment, commit
from .policy import AsyncPolicy, AsyncPolicyBase, BlockingPolicy, Policy, PolicyBase, RequestFailed
from .sampling import Request, Sampling
from .tree import Node, Prompt, SearchTree
from .values import Value

__all__ = [
    "AsyncPolicy", "AsyncPolicyBase", "BlockingPolicy", "Policy", "PolicyBase", "Request", "RequestFailed", "Sampling",
    "Scorer", "ScorerDefaults", "Segment", "commit",
]  # fmt: skip


@runtime_checkable
class Scorer(Protocol):
    """Fills nodes' rewards. ScorerDefaults has what a scorer may have besides."""

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


class ScorerDefaults(ABC):
    """A Scorer with all that a search may ask of one, and an answer for what a scorer has nothing to say to.

    scorers.base.ScorerBase, which scores complete responses too, derives from it. A search completes a plain Scorer
    by `of`.

    Attributes:
        name: key of its rewards in Node.rewards.
        default_value: the value that the scorer's rewards are meant for, used where neither the call nor the strategy
            names one; None for q.
        reward_range: the least and the most that a step's reward can be; None for no bounds.
        whole: it rewards finished answers alone, on their last step; all other steps get 0.
    """

    name: str
    default_value: str | Value | None = None
    reward_range: tuple[float, float] | None = None
    whole: bool = False

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Its models' ids by role, for usage; none."""
        return {}

    @abstractmethod
    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer."""

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        """score_nodes beside the running event loop: in a thread."""
        await asyncio.to_thread(self.score_nodes, nodes)

    def release(self, tree: SearchTree) -> None:  # noqa: B027  # most have something to forget, some have nothing
        """Forget a tree; nothing is kept here."""

    def bind(self, policy: Any) -> None:  # noqa: B027
        """Meet the policy whose nodes are to be scored, before they are; nothing depends on it here."""

    def check_prompt(self, prompt: Prompt) -> None:  # noqa: B027
        """Raise ValueError where responses to a prompt cannot be scored, before any is sampled; all can here."""

    @property
    def policy_context(self) -> int | None:
        """Tokens of the policy that prompt and response may have together; None for no limit."""
        return None

    @property
    def forward_calls(self) -> int | None:
        """Forwards run so far; None to count the calls of score_nodes."""
        return None

    @classmethod
    def of(cls, scorer: Scorer) -> ScorerDefaults:
        """The scorer itself, or a plain one with the defaults for what it lacks."""
        return scorer if isinstance(scorer, ScorerDefaults) else _Completed(scorer)


class _Completed(ScorerDefaults):
    """A plain Scorer. What it has of the rest is used."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.name = scorer.name
        self.default_value = getattr(scorer, "default_value", None)
        self.reward_range = getattr(scorer, "reward_range", None)
        self.whole = getattr(scorer, "whole", False)

    @property
    def models(self) -> Mapping[str, Hashable]:
        return self.scorer.models

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        self.scorer.score_nodes(nodes)

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        own = getattr(self.scorer, "ascore_nodes", super().ascore_nodes)
        await own(nodes)

    def release(self, tree: SearchTree) -> None:
        self.scorer.release(tree)

    def bind(self, policy: Any) -> None:
        own = getattr(self.scorer, "bind", super().bind)
        own(policy)

    def check_prompt(self, prompt: Prompt) -> None:
        own = getattr(self.scorer, "check_prompt", super().check_prompt)
        own(prompt)

    @property
    def policy_context(self) -> int | None:
        return getattr(self.scorer, "policy_context", None)

    @property
    def forward_calls(self) -> int | None:
        return getattr(self.scorer, "forward_calls", None)
