"""Draw: the one rule of how a child is drawn, token by token, for every engine. No torch.

draws = Draw.of(request, tokens, stop_ids)          # one a child
for draw in draws:
    while not draw.done:                            # an engine draws many of them at once
        if not draw.cut_before(top_probability, drawn_probability):
            draw.take(token, logprob)
nodes_of(request, draws, sampler)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Protocol, Self, TypeVar

import numpy as np

from .sampling import Request
from .steps import StepMatcher
from .stop_strings import StopMatcher
from .tokens.pieces import POLICY
from .tree import Node


class Tokens(Protocol):
    """The rule's questions to a vocabulary; `TokenText` answers."""

    def piece(self, token_id: int, /) -> bytes:
        """Bytes that a token adds, for the step rule."""
        ...

    def text_bytes(self, ids: Iterable[int], /) -> bytes:
        """Bytes of the text that these tokens add, without special tokens."""
        ...


@dataclass
class Segment:
    """A step a policy drew: one node of a chain, before it is in the tree. Fields as in Node.

    `text` is bytes where it may begin or end inside a character.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | bytes = ""
    finish: str = "step"
    hidden: int = 0
    confidences: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Draw:
    """One child while it is drawn. It decides where its steps and its response end; engines bring the tokens.

    Decisions are taken in this order. An unsure token ends the step before it. A token of `stop_ids`, one that
    completes a stop string, or a stop condition of the engine ends the response; so does the child's cap. Then the
    StepRule may end the step. Make it with `of`; engines derive from it and add what they need (with defaults).

    Attributes:
        request, index: the child's place in what was asked for.
        tokens: the policy's vocabulary.
        stop_ids: tokens that end a response.
        matcher: where its steps end.
        stops: finds the sampling's stop strings; None for a sampling without any.
        left: tokens it may still draw.
        chain: the steps drawn, the last one under way; closed where `fresh`.
        fresh: the next token starts a new step.
        drawn: tokens in the chain.
        done: it draws no more.
        recent: confidences of the group that the request's floor looks at; None without a floor.
    """

    request: Request
    index: int
    tokens: Tokens
    stop_ids: frozenset[int]
    matcher: StepMatcher
    stops: StopMatcher | None
    left: int
    chain: list[Segment] = field(default_factory=list)
    fresh: bool = True
    drawn: int = 0
    done: bool = False
    recent: deque[float] | None = None

    @classmethod
    def of(cls, request: Request, tokens: Tokens, stop_ids: frozenset[int]) -> list[Self]:
        """Begin the children of a request."""
        node, sampling = request.node, request.sampling
        matcher = sampling.steps.matcher(tokens.piece, node)
        stops = StopMatcher(sampling.stop, tokens.text_bytes(node.path_ids())) if sampling.stop else None
        draws = [
            cls(request, i, tokens, stop_ids, matcher.copy(), None if stops is None else stops.copy(), cap)
            for i, cap in enumerate(request.caps)
        ]
        if request.floor is not None:
            known = [x for part in node.path() if part.confidences is not None for x in part.confidences.tolist()]
            for draw in draws:
                draw.recent = deque(known, request.floor.window)
        return draws

    @property
    def lineage(self) -> int:
        """Its random stream."""
        return self.request.lineages[self.index]

    @property
    def position(self) -> int:
        """Response position of the next token."""
        return self.request.node.end + self.drawn

    @property
    def sampled(self) -> int:
        """Tokens drawn for it, as usage counts them. An engine that draws beyond its end counts those too."""
        return self.drawn

    def ids(self) -> list[int]:
        """Prompt and response so far."""
        node = self.request.node
        own = [i for segment in self.chain for i in segment.token_ids]
        return [*node.tree.prompt_ids, *node.path_ids(), *own]

    @property
    def rank(self) -> int | None:
        """The place, among the most probable tokens, of the next token; None where it is drawn."""
        return self.index if self.request.ranked and not self.drawn else None

    def cut_before(self, top_probability: float, drawn_probability: float = 1.0) -> bool:
        """End the step here where the policy is unsure of the next token. Return True if that ends the child.

        Args:
            top_probability: of the most probable next token, in [0, 1], before temperature and filters; it matters
                where the StepRule has confidence_of="top".
            drawn_probability: of the token that was drawn; it matters with confidence_of="drawn".
        """
        first = self.request.doubting and not self.drawn
        if (first or not self.fresh) and self.matcher.uncertain(top_probability, drawn_probability, first=first):
            self.matcher.cut()
            if self.chain:
                self._close()
            self.done = self.request.until == "step"
        return self.done

    def take(self, token: int, logprob: float, confidence: float | None = None, *, stop: bool = False) -> None:
        """Record the next token and see what it ends.

        Args:
            token: its id.
            logprob: raw log-probability under the policy, nats.
            confidence: see Node.confidences; used where the sampling has confidence_tokens.
            stop: a stop condition of the engine's own ends the response with it.
        """
        self.record(token, logprob, confidence)
        self.settle(stop)

    def record(self, token: int, logprob: float, confidence: float | None = None) -> None:
        """Record the next token; `settle` has to follow. Raises RuntimeError where the child is done."""
        if self.done:
            raise RuntimeError("this child is done: it takes no further token")
        if self.fresh:
            self.chain.append(Segment())
            self.fresh = False
        segment = self.chain[-1]
        segment.token_ids.append(token)
        segment.logprobs.append(logprob)
        if confidence is not None and self.request.sampling.confidence_tokens:
            segment.confidences.append(confidence)
            if self.recent is not None:
                self.recent.append(float(np.float32(confidence)))  # as the node keeps it, whose means are compared
        self.drawn += 1
        self.left -= 1

    def record_many(
        self, tokens: Sequence[int], logprobs: Sequence[float], confidences: Sequence[float] | None = None
    ) -> None:
        """Record next tokens of which an engine knows already that none of them ends the step or the child.

        The matcher has to be told apart from this. Raises RuntimeError where the child is done.
        """
        if self.done:
            raise RuntimeError("this child is done: it takes no further token")
        if not tokens:
            return
        if self.fresh:
            self.chain.append(Segment())
            self.fresh = False
        segment = self.chain[-1]
        segment.token_ids.extend(tokens)
        segment.logprobs.extend(logprobs)
        if confidences is not None and self.request.sampling.confidence_tokens:
            segment.confidences.extend(confidences)
            if self.recent is not None:
                self.recent.extend(np.asarray(confidences, np.float32).tolist())
        self.drawn += len(tokens)
        self.left -= len(tokens)

    def settle(self, stop: bool = False) -> None:
        """See whether the newest token ends the step or the child; stop as in `take`."""
        segment = self.chain[-1]
        token = segment.token_ids[-1]
        step = self.matcher.feed(token) or self.request.ranked
        match = None if self.stops is None else self.stops.feed(self.tokens.text_bytes([token]))
        if stop or match is not None or token in self.stop_ids:
            segment.finish, self.done = "stop", True
        elif self.left == 0:
            segment.finish, self.done = self.request.cap_reasons[self.index], True
        elif self._weak():
            segment.finish, self.done = "weak", True
        elif step:
            segment.finish, self.done = "step", self.request.until == "step"
        if self.done or step:
            self._close()
        if match is not None:
            written = self.tokens.text_bytes(segment.token_ids)
            segment.text = written[: len(written) - match.behind]
            segment.hidden = 0 if self.request.sampling.include_stop_str else match.length

    def _weak(self) -> bool:
        """Return True if the newest group of tokens lies below the request's floor."""
        floor, recent = self.request.floor, self.recent
        if floor is None or recent is None or len(recent) < floor.window:
            return False
        return fsum(recent) / floor.window < floor.bar

    def interrupt(self, finish: str = "budget") -> None:
        """End the child now, the step under way as it is. A child that has drawn nothing makes no node."""
        if not self.done and self.chain:
            self.chain[-1].finish = finish
            self._close()
        self.done = True

    def _close(self) -> None:
        self.fresh = True
        segment = self.chain[-1]
        segment.text = self.tokens.text_bytes(segment.token_ids)


AnyDraw = TypeVar("AnyDraw", bound=Draw)


def nodes_of(request: Request, draws: Sequence[AnyDraw], sampler: Hashable | None) -> list[tuple[AnyDraw, list[Node]]]:
    """Put into the tree what the children of a request drew, and count it on the tree's meter.

    Args:
        request: what they answer.
        draws: the children, each done.
        sampler: id of the model that drew, for Node.sampler and the meter.

    Returns:
        The children that have drawn something, in order, each with the nodes of its chain; twins share nodes.
    """
    tree = request.node.tree
    tree.meter.add("sampled", sampler, sum(draw.sampled for draw in draws))
    if draws:
        tree.vocabularies[POLICY] = draws[0].tokens
    kept = [draw for draw in draws if draw.chain]
    request = replace(request, lineages=tuple(draw.lineage for draw in kept))
    return list(zip(kept, commit(request, [draw.chain for draw in kept], sampler), strict=True))


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
                node.hidden = segment.hidden
                node.confidences = np.asarray(segment.confidences, np.float32) if segment.confidences else None
            nodes.append(node)
        for inner in nodes[:-1]:  # the chain went on from here in its own lineage: child 0 is drawn
            inner.drawn = 1
        made.append(nodes)
    return made
