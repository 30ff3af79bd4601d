"""Facts that policies of both kinds may state, and those of a plain policy as it states them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from ..tree import Prompt, SearchTree

TELLS_NONE = "a judge needs a policy that tells log-probabilities of the next token, and a {} does not"


class PolicyFacts(ABC):
    """Facts that policies of both kinds may state.

    Attributes:
        id: of the model whose raw log-probabilities the nodes carry.
        context: tokens that prompt and response may have together, at which a search stops as it does at
            max_new_tokens; None for no limit.
        forward_calls: forwards run so far; None to count the calls of advance (of run, where it is asynchronous).
        alpha: strength with which every token is steered; None where it is not.
        tokenizer: its transformers tokenizer; None where it has none.
        top_tokens: most probable tokens that it can tell at each place, for Sampling.confidence_tokens and ranked
            requests; 0 where it tells none. A search that needs more is refused.
        ranks: whether it answers requests that are ranked or doubting, as all do that draw by drawing.Draw and ask it
            for its `rank`.
        names: of the policies that an Expand may ask for one of; none for a single policy.
        choice: the (below, candidates, confidence_of) by which every token is chosen; see Steer. None where it is not.
        takes_stop: whether responses end at Sampling.stop, as all do that are drawn by drawing.Draw. A search with stop
            strings is refused where they do not.
    """

    if TYPE_CHECKING:  # read-only to a type checker: a derived class may compute them, or set them as attributes

        @property
        def id(self) -> Hashable: ...
        @property
        def context(self) -> int | None: ...
        @property
        def forward_calls(self) -> int | None: ...
    else:
        context = forward_calls = None

    alpha: float | None = None
    tokenizer: Any = None
    takes_stop: bool = False
    top_tokens: int = 0
    ranks: bool = False
    names: tuple[str, ...] = ()
    choice: tuple[float | None, int | None, str] | None = None

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Ids of its models by role, for usage; "policy" is the one whose id is this policy's."""
        return {"policy": self.id}

    @abstractmethod
    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ValueError where it is empty or leaves no room in the context."""

    @abstractmethod
    def release(self, tree: SearchTree) -> None:
        """Forget a tree: drop its unanswered requests and free its KV."""


class StatedFacts(PolicyFacts):
    """Facts of a plain policy of either kind, read off its attributes."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.alpha, self.tokenizer = getattr(policy, "alpha", None), getattr(policy, "tokenizer", None)
        self.takes_stop = getattr(policy, "takes_stop", False)
        self.top_tokens = getattr(policy, "top_tokens", 0)
        self.ranks = getattr(policy, "ranks", False)

    @property
    def id(self) -> Hashable:
        return self._policy.id

    @property
    def context(self) -> int | None:
        return getattr(self._policy, "context", None)

    @property
    def forward_calls(self) -> int | None:
        return getattr(self._policy, "forward_calls", None)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return self._policy.encode(prompt)

    def release(self, tree: SearchTree) -> None:
        self._policy.release(tree)
