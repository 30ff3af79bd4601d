"""Policy and Scorer: all that the driver knows of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from .drawing import Segment, commit
from .sampling import Request, Sampling
from .tree import Node, Prompt, SearchTree

__all__ = ["AsyncPolicy", "BlockingPolicy", "Policy", "Request", "Sampling", "Scorer", "Segment", "commit"]


@runtime_checkable
class Policy(Protocol):
    """Samples steps.

    The driver calls submit and advance until its requests are answered; expand is the same for people who
    drive a search by hand. A policy counts what it did on `node.tree.meter`.

    Optional: `context`, the tokens that prompt and response may have together (a search then stops there as it does at
    max_new_tokens; a scorer says so in `policy_context`); `forward_calls`, forwards run so far (otherwise calls of
    advance are counted; a scorer may have it too); and `session()`, the same policy for one more loop, with requests
    of its own: a policy without it serves one loop at a time.
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


class BlockingPolicy(ABC):
    """Base of policies that answer a whole batch of requests in one call: derive, call super().__init__(), write `run`.

    It supplies submit, advance, interrupt, expand and release of Policy; id and encode remain the subclass's.
    """

    def __init__(self) -> None:
        self._waiting: list[Request] = []

    @abstractmethod
    def run(self, requests: Sequence[Request]) -> list[list[Node]]:
        """Answer requests: for each, the last node of every child's chain (twins repeated), in child order."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests on; the next advance answers them."""
        self._waiting.extend(requests)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """Answer everything that waits, in one round."""
        requests, self._waiting = self._waiting, []
        return list(zip(requests, self.run(requests), strict=True)) if requests else []

    def interrupt(self, request: Request) -> list[Node]:
        """Drop a request; between two rounds none has drawn anything."""
        self._waiting.remove(request)
        return []

    def expand(
        self, nodes: Sequence[Node], n: int, *, sampling: Sampling, until: Literal["step", "end"] = "step"
    ) -> list[list[Node]]:
        """Draw n children of each lineage of each node and return them, one list a node (twins repeated)."""
        return self.run([Request.draw(node, n, sampling, until=until) for node in nodes])

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's waiting requests. A policy that caches anything for a tree frees it here too."""
        self._waiting = [request for request in self._waiting if request.node.tree is not tree]


@runtime_checkable
class AsyncPolicy(Protocol):
    """Samples steps on an event loop (vLLM's AsyncLLM, an HTTP server): one task a request.

    `interrupt(request)` is optional: it asks a running request to end soon with what it has drawn (finish "budget");
    without it the task is cancelled and what it has drawn is lost.
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
