"""Policy and Scorer: all that the driver knows of models, and the records that pass between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from .checks import integer, number
from .rng import child_lineage
from .tree import Node, Prompt, SearchTree

if TYPE_CHECKING:
    from .steps import StepRule


@dataclass(frozen=True)
class Sampling:
    """How a policy draws tokens. Filters apply in HF's order: temperature, top-k, top-p, min-p.

    Args:
        steps: where a step ends.
        temperature: > 0 divides the logits; 0 takes the most probable token.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        max_new_tokens: response tokens of a path, all steps together.
        seed: 64-bit seed of every draw.

    Raises:
        ValueError: a number is out of range or not finite.
        TypeError: what should be a number is none.
    """

    steps: StepRule
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        number("temperature", self.temperature, "a finite number >= 0", lambda value: 0 <= value < float("inf"))
        number("top_p", self.top_p, "a number in (0, 1]", lambda value: 0 < value <= 1)
        number("min_p", self.min_p, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        integer("top_k", self.top_k, 0, "an integer >= 0 (0 keeps all)")
        integer("max_new_tokens", self.max_new_tokens, 1, "an integer >= 1")


@dataclass(eq=False)
class Request:
    """Children to draw for one node.

    Attributes:
        node: an unfinished node.
        sampling: how to draw.
        lineages: the random stream of each child; their number is the number of children.
        caps: tokens each child may add at most, all >= 1.
        cap_reasons: the finish ("length" or "budget") of a child that its cap cuts.
        until: "step" or "end" (see strategies.Expand).
        rollout: mark the children.
        merge: count identical children on one node.
    """

    node: Node
    sampling: Sampling
    lineages: tuple[int, ...]
    caps: tuple[int, ...]
    cap_reasons: tuple[str, ...]
    until: Literal["step", "end"] = "step"
    rollout: bool = False
    merge: bool = True

    @classmethod
    def draw(
        cls,
        node: Node,
        n: int | Sequence[int],
        sampling: Sampling,
        *,
        until: Literal["step", "end"] = "step",
        caps: Sequence[int] | None = None,
        cap_reason: str = "length",
        rollout: bool = False,
        merge: bool = True,
    ) -> Request:
        """The next children of a node, lineage by lineage; advances node.drawn.

        Args:
            n: children of each lineage, or one number a lineage (lineages beyond the last number get none).
            caps: one a child; None for what sampling.max_new_tokens leaves.
            cap_reason: the finish of a child that its cap cuts before sampling.max_new_tokens does.
        """
        counts = [n] * node.count if isinstance(n, int) else list(n)
        if len(counts) > node.count:
            raise ValueError(f"n has {len(counts)} numbers for {node.count} lineages")
        lineages = tuple(
            child_lineage(lineage, node.end, node.drawn + i)
            for lineage, count in zip(node.lineages, counts, strict=False)
            for i in range(count)
        )
        room = sampling.max_new_tokens - node.end
        given = [room] * len(lineages) if caps is None else list(caps)
        if len(given) != len(lineages):
            raise ValueError(f"caps has {len(given)} numbers for {len(lineages)} children")
        if any(min(cap, room) < 1 for cap in given):
            raise ValueError(f"no room for children: caps {given} after {node.end} of {sampling.max_new_tokens} tokens")
        node.drawn += max(counts, default=0)
        reasons = tuple("length" if cap >= room else cap_reason for cap in given)
        return cls(node, sampling, lineages, tuple(min(cap, room) for cap in given), reasons, until, rollout, merge)


@dataclass
class Segment:
    """A step a policy drew: one node of a chain, before it is in the tree. Fields as in Node."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = "step"


def commit(request: Request, chains: Sequence[Sequence[Segment]], sampler: Hashable | None) -> list[list[Node]]:
    """Put the chains drawn for a request into its tree, in child order, merging twins where it asks for that.

    Twins are steps with equal tokens and finish below one node. Only twins of one request are merged, so that what is
    merged never depends on which of two requests was answered first.

    Args:
        request: the request they answer.
        chains: one a child, each at least one segment.
        sampler: id of the model that drew them, for Node.sampler.

    Returns:
        One list of nodes a child, first to last; twins share nodes.
    """
    made: list[list[Node]] = []
    twins: dict[tuple[Node, tuple[int, ...], str], Node] = {}
    for lineage, chain in zip(request.lineages, chains, strict=True):
        node, nodes = request.node, []
        for segment in chain:
            key = (node, tuple(segment.token_ids), segment.finish)
            twin = twins.get(key) if request.merge else None
            if twin is not None:
                twin.lineages += (lineage,)
                node = twin
            else:
                node = twins[key] = request.node.tree.add(
                    node,
                    segment.token_ids,
                    text=segment.text,
                    logprobs=None if not segment.logprobs else np.asarray(segment.logprobs, np.float32),
                    sampler=sampler,
                    finish=segment.finish,
                    lineage=lineage,
                    rollout=request.rollout,
                )
            nodes.append(node)
        for inner in nodes[:-1]:  # the chain went on from here in its own lineage: child 0 is drawn
            inner.drawn = 1
        made.append(nodes)
    return made


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
