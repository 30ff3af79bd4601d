"""DraftPolicy: a small model proposes each step, a large one writes those with which a scorer is not content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan

from ..checks import number, require
from ..policy import Policy, PolicyBase
from ..protocols import Scorer, ScorerDefaults
from ..sampling import Request
from ..tree import Node, SearchTree
from ..values import Value, resolve_value
from .joint import JointPolicy


@dataclass(eq=False)
class _Child:
    """A child of a request while it is written, step by step.

    Attributes:
        node: its end so far.
        lineage: its random stream.
        path: tokens it may still add to its path.
        left: tokens that both models may still draw for it; None for no limit beside `path`.
        done: it is complete.
    """

    node: Node
    lineage: int
    path: int
    left: int | None
    done: bool = False

    @property
    def cap(self) -> int:
        return self.path if self.left is None else min(self.path, self.left)


class DraftPolicy(JointPolicy):
    """Reward-guided speculation (RSD, B. Liao et al., arXiv 2501.19324): the draft proposes each step, and the target
    writes it anew where the scorer's reward of the proposal is below `accept`.

    It is a policy, so it goes under any strategy. Both models' tokens are sampled tokens, and a token budget holds for
    both together: they are usage's "policy" (the target) and "draft". A step carries the log-probabilities of the model
    that wrote it. A rejected proposal leaves the tree, and its tokens stay counted. The scorer may be the one of the
    search, which then finds the accepted steps scored. Draws are functions of their place, as everywhere.

    Args:
        draft: the small model's policy.
        target: the large model's, with the same tokens. It encodes prompts.
        scorer: rewards proposals.
        accept: the least value of a proposal that stands: 0.7 is RSD's, for scores in [0, 1]. A pair's step rewards are
            in beta * nats, where 0 says that the trained model finds the step as probable as the reference.
        value: of a proposal; None for its step reward, or a name or a function of a node.

    Attributes:
        accepted, rejected: proposals so far, by all sessions.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: accept is NaN, no value has this name, or the policies have different tokens.
    """

    def __init__(
        self, draft: Policy, target: Policy, scorer: Scorer, accept: float = 0.7, *, value: Value | str | None = None
    ) -> None:
        super().__init__({"target": target, "draft": draft})
        require("scorer", scorer, Scorer)
        number("accept", accept, "a number", lambda x: not isnan(x))
        self.scorer = ScorerDefaults.of(scorer)
        self.accept = float(accept)
        self._value = None if value is None else resolve_value(value)
        self._counts = [0, 0]
        self.scorer.bind(target)
        self._begin()

    def _begin(self) -> None:
        self._jobs: dict[Request, list[_Child]] = {}
        self._proposals: dict[Request, tuple[Request, list[_Child]]] = {}  # the draft's requests, and whose they are
        self._written: dict[Request, tuple[Request, list[_Child]]] = {}  # the target's

    @property
    def accepted(self) -> int:
        """Proposals that stood."""
        return self._counts[0]

    @property
    def rejected(self) -> int:
        """Proposals that the target wrote anew."""
        return self._counts[1]

    @property
    def draft(self) -> PolicyBase:
        """The small model's policy."""
        return self.parts["draft"]

    def submit(self, requests: Sequence[Request]) -> None:
        """See Policy.submit. Requests that draw nothing, or may be of no token, are the target's alone."""
        for request in requests:
            children = [
                _Child(request.node, lineage, cap, cap if request.strict else None)
                for lineage, cap in zip(request.lineages, request.caps, strict=True)
            ]
            self._jobs[request] = children
            if request.ranked or request.doubting:
                self._written[request] = (request, children)
                self.lead.submit([request])
            else:
                self._propose(request, children)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward of each model that has something to draw; see Policy.advance."""
        answered: list[tuple[Request, list[Node]]] = []
        if self._proposals:
            self._judge(self.draft.advance())
        if self._written:
            for request, ends in self.lead.advance():
                outer, children = self._written.pop(request)
                if request is outer:
                    answered.append((outer, ends))
                    del self._jobs[outer]
                else:
                    self._take(outer, children, ends)
        done = [request for request, children in self._jobs.items() if all(child.done for child in children)]
        return answered + [(request, self._ends(request)) for request in done]

    def _propose(self, request: Request, children: Sequence[_Child]) -> None:
        """Have the draft write the next step of these children."""
        for node, group in _by_node(children).items():
            proposal = _step(request, node, group)
            self._proposals[proposal] = (request, group)
            self.draft.submit([proposal])

    def _judge(self, answered: Sequence[tuple[Request, list[Node]]]) -> None:
        """Score proposals; take those that stand, and have the target write the others."""
        nodes = list(dict.fromkeys(node for _, ends in answered for node in ends))
        if nodes:
            self.scorer.score_nodes(nodes)
        for proposal, ends in answered:
            request, children = self._proposals.pop(proposal)
            by_lineage = {lineage: node for node in ends for lineage in node.lineages}
            rejected: list[_Child] = []
            for child in children:
                node = by_lineage[child.lineage]
                tokens = len(node.token_ids)
                if self._worth(node) >= self.accept or child.left == tokens:  # no token is left to write it anew
                    self._counts[0] += 1
                else:
                    self._counts[1] += 1
                    rejected.append(child)
                    child.left = None if child.left is None else child.left - tokens
                    request.wasted += tokens
            gone = {child.lineage for child in rejected}
            self._take(request, [child for child in children if child.lineage not in gone], ends)
            for node in {by_lineage[child.lineage] for child in rejected}:
                node.lineages = tuple(lineage for lineage in node.lineages if lineage not in gone)
                if not node.lineages:
                    node.tree.discard(node)
            for node, group in _by_node(rejected).items():
                writing = _step(request, node, group)
                self._written[writing] = (request, group)
                self.lead.submit([writing])

    def _worth(self, node: Node) -> float:
        return node.reward_of(self.scorer.name) if self._value is None else self._value(node)

    def _take(self, request: Request, children: Sequence[_Child], ends: Sequence[Node]) -> None:
        """Go on from the steps that these children have got."""
        by_lineage = {lineage: node for node in ends for lineage in node.lineages}
        live: list[_Child] = []
        for child in children:
            node = by_lineage[child.lineage]
            tokens = len(node.token_ids)
            if child.node is not request.node:
                child.node.drawn = 1  # it goes on in its own lineage
            child.node, child.path = node, child.path - tokens
            child.left = None if child.left is None else child.left - tokens
            child.done = request.until == "step" or node.finished
            if not child.done:
                live.append(child)
        if live:
            self._propose(request, live)

    def _ends(self, request: Request) -> list[Node]:
        return [child.node for child in self._jobs.pop(request) if child.node is not request.node]

    def interrupt(self, request: Request) -> list[Node]:
        """See Policy.interrupt. A proposal that is under way stands as it is."""
        for policy, asked in ((self.draft, self._proposals), (self.lead, self._written)):
            for inner in [inner for inner, (outer, _) in asked.items() if outer is request]:
                _, children = asked.pop(inner)
                ends = policy.interrupt(inner)
                if inner is request:
                    del self._jobs[request]
                    return ends
                by_lineage = {lineage: node for node in ends for lineage in node.lineages}
                for child in children:
                    child.node = by_lineage.get(child.lineage, child.node)
        return self._ends(request)

    def _asker(self, request: Request) -> Request:
        return (self._proposals.get(request) or self._written[request])[0]

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget unanswered requests; see PolicyBase.drop."""
        gone = set(requests)
        for policy, asked in ((self.draft, self._proposals), (self.lead, self._written)):
            inner = [inner for inner, (outer, _) in asked.items() if outer in gone]
            policy.drop(inner)
            for request in inner:
                del asked[request]
        for request in requests:
            self._jobs.pop(request, None)

    def release(self, tree: SearchTree) -> None:
        """Forget a tree in both policies and in the scorer."""
        for asked in (self._jobs, self._proposals, self._written):
            for request in [request for request in asked if request.node.tree is tree]:
                del asked[request]
        super().release(tree)
        self.scorer.release(tree)


def _by_node(children: Sequence[_Child]) -> dict[Node, list[_Child]]:
    groups: dict[Node, list[_Child]] = {}
    for child in children:
        groups.setdefault(child.node, []).append(child)
    return groups


def _step(request: Request, node: Node, children: Sequence[_Child]) -> Request:
    """A request for the next step of these children, which end at one node."""
    reasons = tuple(
        "budget" if child.left is not None and child.left < child.path else reason
        for child, reason in zip(children, _reasons(request, children), strict=True)
    )
    return replace(
        request, node=node, lineages=tuple(child.lineage for child in children),
        caps=tuple(child.cap for child in children), cap_reasons=reasons, until="step",
    )  # fmt: skip


def _reasons(request: Request, children: Sequence[_Child]) -> list[str]:
    reasons = dict(zip(request.lineages, request.cap_reasons, strict=True))
    return [reasons[child.lineage] for child in children]
