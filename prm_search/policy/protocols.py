"""Policy, AsyncPolicy: the least that a search needs of what samples steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, Protocol, runtime_checkable

from ..sampling import Request, Sampling
from ..tree import Node, Prompt, SearchTree


class RequestFailed(RuntimeError):
    """A policy has given up on one request for good. The search that asked for it ends there; others go on."""


@runtime_checkable
class Policy(Protocol):
    """Samples steps.

    The driver calls submit and advance until its requests are answered; expand is the same for people who
    drive a search by hand. A policy counts what it did on `node.tree.meter`.

    This is the least that a policy needs. PolicyBase names all that a search may ask besides. A policy that does not
    derive from PolicyBase may have any of these members too (`PolicyBase.of` looks, once a search).
    """

    @property
    def id(self) -> Hashable:
        """Id of the model whose raw log-probabilities the nodes carry."""
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ValueError where it is empty or leaves no room in the context."""
        ...

    def expand(
        self, nodes: Sequence[Node], n: int, *, sampling: Sampling, until: Literal["step", "end"] = "step"
    ) -> list[list[Node]]:
        """Draw n children of each lineage of each node and return them, one list a node."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests on; nothing is computed yet."""
        ...

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward (or one blocking round). Returns the requests that ended in it, each with the last node of
        every child's chain (twins repeated); empty where none did."""
        ...

    def interrupt(self, request: Request) -> list[Node]:
        """End a request now: what its children have drawn so far becomes nodes with finish "budget"; a child
        that has drawn nothing gives none."""
        ...

    def release(self, tree: SearchTree) -> None:
        """Forget a tree: drop its unanswered requests and free its KV."""
        ...


@runtime_checkable
class AsyncPolicy(Protocol):
    """Samples steps on an event loop (vLLM's AsyncLLM, an HTTP server): one task a request.

    This is the least that it needs. AsyncPolicyBase names all that a search may ask besides. A policy that does not
    derive from AsyncPolicyBase may have any of these members too; `interrupt` may be a function or a coroutine.
    """

    @property
    def id(self) -> Hashable:
        """Id of the model whose raw log-probabilities the nodes carry."""
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """As in Policy."""
        ...

    async def run(self, request: Request) -> list[Node]:
        """The last node of every child's chain (twins repeated)."""
        ...

    def release(self, tree: SearchTree) -> None:
        """As in Policy."""
        ...
