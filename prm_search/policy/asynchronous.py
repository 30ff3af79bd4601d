"""AsyncPolicyBase: policies on an event loop, with all that a search may ask of one."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any

from ..checks import require
from ..next_token import NextToken
from ..sampling import Request
from ..tree import Node
from .facts import TELLS_NONE, PolicyFacts, StatedFacts
from .protocols import AsyncPolicy


class AsyncPolicyBase(PolicyFacts):
    """An AsyncPolicy with all that a search may ask of one. Policies of the library derive from it; others may."""

    @abstractmethod
    async def run(self, request: Request) -> list[Node]:
        """The last node of every child's chain (twins repeated)."""

    def interrupt(self, request: Request) -> bool | Awaitable[bool]:
        """Ask a running request to end soon with what it has drawn (finish "budget"); a request that has ended is left
        alone.

        Returns:
            False where that cannot be: its task is then cancelled, and what it has drawn is lost. It may be awaitable.
        """
        return False

    async def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests whose tasks were cancelled while their search goes on; returns once nothing is drawn for them
        and what was drawn is counted. A policy whose cancelled `run` does that itself has nothing more to do."""

    async def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """As PolicyBase.next_token_logprobs, on the running event loop."""
        raise TypeError(TELLS_NONE.format(type(getattr(self, "_policy", self)).__name__))

    @classmethod
    def of(cls, policy: AsyncPolicy) -> AsyncPolicyBase:
        """The policy itself, or a plain AsyncPolicy with the answers that it lacks. Raises TypeError for anything
        else."""
        if isinstance(policy, AsyncPolicyBase):
            return policy
        require("policy", policy, AsyncPolicy)
        return _CompletedAsync(policy)


class _CompletedAsync(StatedFacts, AsyncPolicyBase):
    """A plain AsyncPolicy. What it has of the rest is used."""

    async def run(self, request: Request) -> list[Node]:
        return await self._policy.run(request)

    async def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        own: Any = getattr(self._policy, "next_token_logprobs", super().next_token_logprobs)
        return list(await own(asks, words))

    async def interrupt(self, request: Request) -> bool:
        own: Any = getattr(self._policy, "interrupt", None)
        if own is None:
            return False
        reply = own(request)
        if inspect.isawaitable(reply):
            await reply
        return True
