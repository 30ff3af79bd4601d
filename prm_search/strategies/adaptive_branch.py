"""AB-MCTS-A: whether to go wider or deeper is drawn from what was found so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..checks import is_one_of
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct
from .beam import value_of
from .thompson import Moments, Thompson

Prior = Literal["gaussian", "beta"]
Rule = Literal["values", "published"]


@dataclass(frozen=True)
class AdaptiveBranch:
    """Draw each new child where Thompson sampling says: beside a node's children, or below one of them.

    Source: Y. Inoue et al., "Wider or Deeper? Scaling LLM Inference-Time Compute with Adaptive Branching Tree Search"
    (AB-MCTS-A, arXiv 2503.04412), and its released code (treequest). rule="published" is that: every node has two arms,
    GEN (a new child) and CONT (below a child), and each child an arm of its own. A walk from the root samples what each
    arm may give from its posterior and takes the larger, until it takes GEN. The score of the new child is an
    observation of that node's GEN. At each ancestor it is an observation of CONT and of the child on the way. Priors
    are those of the code: normal-inverse-chi-square with m = 0, kappa = 1, nu = 1, tau^2 = .1, or Beta(1/2, 1/2).

    Published nodes are whole answers, and nothing is known of one before it is drawn. rule="values" is for scorers that
    value every step:
        GEN competes with each child rather than with all of them pooled, so one good child is enough to go deeper.
        An arm's prior is centred at the value of its own node, and tau^2 = .01.
        Scores are less their trend, the mean change of a value from a step to the next one, so that prefixes of
        different depth compare. Without it a fresh first step looks better than a path that was followed.
    It was chosen on development problems of the demo's task (benchmarks/results/method/strategies.md).

    Values enter on a scale of [0, 1] between the lowest and the highest seen in the tree so far. With until="end" each
    draw goes on to the end of a response. Scores then compare whole answers, and a walk chooses the step from which the
    next answer branches off. until="step" draws single steps.

    With `policies`, several models share the search. Each of them is a GEN arm of its own at every node, which learns
    from the children that this model drew there; the search's policy is a PolicyPool that has these names.

    Args:
        draws: children drawn in all.
        prior: "gaussian" or "beta".
        until: "end" or "step"; see above.
        batch: walks at once, each from the same posterior, so that batches stay full.
        policies: names of policies, each an action; () for the search's only policy.
        rule: "values" or "published".
        value: the score; None for what the search ranks by.

    Raises:
        ValueError: a number is below 1, a name is unknown, or a policy is named twice.
        TypeError: policies are not strings.
    """

    draws: int = 32
    prior: Prior = "gaussian"
    until: Literal["end", "step"] = "end"
    batch: int = 4
    value: Value | str | None = None
    policies: tuple[str, ...] = ()
    rule: Rule = "values"

    def __post_init__(self) -> None:
        if not isinstance(self.policies, list | tuple) or not all(isinstance(name, str) for name in self.policies):
            raise TypeError(f"policies={self.policies!r}: a list of names is needed")
        names = tuple(self.policies)
        if len(set(names)) < len(names):
            raise ValueError(f"policies={self.policies!r}: each name once")
        object.__setattr__(self, "policies", names)  # hashable
        at_least("draws", self.draws)
        at_least("batch", self.batch)
        if not is_one_of(self.prior, ("gaussian", "beta")):
            raise ValueError(f"prior={self.prior!r}: it is 'gaussian' or 'beta'")
        if not is_one_of(self.until, ("end", "step")):
            raise ValueError(f"until={self.until!r}: it is 'end' or 'step'")
        if not is_one_of(self.rule, ("values", "published")):
            raise ValueError(f"rule={self.rule!r}: it is 'values' or 'published'")
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        walks = _Walks(root, self.prior, self.policies or (None,), published=self.rule == "published")
        finished: list[Node] = []
        drawn = 0
        while drawn < self.draws and walks.root.open:
            walks.settle()
            chosen = [walks.choose() for _ in range(min(self.batch, self.draws - drawn))]
            drawn += len(chosen)
            for policy in self.policies or (None,):
                counts = Counter(arms for arms, name in chosen if name == policy and not arms.node.finished)
                if not counts:
                    continue
                # One request a place: its children are told apart by their parent.
                places = [arms.node for arms in counts]
                ends = yield Expand(
                    places, list(counts.values()), until=self.until, merge=False, alive=[root], policy=policy
                )
                finished += [end for end in ends if end.finished]
                walks.learn(list(counts), ends, policy)
        if not finished:
            end = walks.best_open()
            finished += yield Expand([end], 1, until="end", merge=False, alive=[end])
        return distinct(finished)


CONT, GEN = 0, 1  # rows of a node's arms: below a child; a new child, one row a policy; and then the children


class _Arms:
    """A node's arms.

    Attributes:
        node, parent, children: the tree; children are in order of creation.
        score: its node's value, finite; 0 of the root.
        row: of its own arm among its parent's.
        moments: what each of its arms has given, by row; made when the first of them is asked for.
        open: whether anything below can still be drawn.
    """

    __slots__ = ("_moments", "_policies", "children", "node", "open", "parent", "row", "score")

    def __init__(self, node: Node, parent: _Arms | None, policies: int, score: float) -> None:
        self.node, self.parent, self.score = node, parent, score
        self.children: list[_Arms] = []
        self._policies = policies
        self._moments: Moments | None = None
        self.open = not node.finished
        self.row = 0
        if parent is not None:
            self.row = parent.moments.add_row(score, node.depth, barred=not self.open)
            parent.children.append(self)

    @property
    def moments(self) -> Moments:
        if self._moments is None:
            own = math.nan if self.parent is None else self.score
            self._moments = Moments(GEN + self._policies, own, self.node.depth)
        return self._moments

    def close(self) -> None:
        """Draw nothing below any more."""
        self.open = False
        if self.parent is not None:
            self.parent.moments.bar(self.row)


class _Walks:
    """The arms of a search, and the walks over them."""

    def __init__(self, root: Node, prior: Prior, policies: Sequence[str | None], *, published: bool) -> None:
        self._policies, self._pooled = policies, published
        self.root = _Arms(root, None, len(policies), 0.0)
        self._arms = {root: self.root}
        self._thompson = Thompson(root.tree, prior, published=published)

    def settle(self) -> None:
        """Take in what was learnt, before walks that share a posterior."""
        self._thompson.settle()

    def choose(self) -> tuple[_Arms, str | None]:
        """Walk from the root to the node that gets a new child, and to the policy that draws it."""
        arms, draw, policies = self.root, self._thompson, self._policies
        first = GEN + len(policies)
        while True:
            if not arms.children and len(policies) == 1:
                return arms, policies[0]
            moments = arms.moments
            draw.renew(moments)
            worth = [draw.sample(moments, row) for row in range(GEN, first)]
            best = worth.index(max(worth))
            if moments.barred == len(arms.children):
                return arms, policies[best]
            if self._pooled:
                if worth[best] >= draw.sample(moments, CONT):
                    return arms, policies[best]
                _, row = draw.best(moments, first)
            else:
                below, row = draw.best(moments, first)
                if worth[best] >= below:
                    return arms, policies[best]
            arms = arms.children[row - first]

    def learn(self, chosen: Iterable[_Arms], ends: Sequence[Node], policy: str | None) -> None:
        """Take in what this policy drew at these places, which ends with these nodes."""
        for end in ends:
            if end in self._arms:  # the budget let its place have no child
                self._arms[end].close()
                continue
            self._plant(end, policy)
        for arms in chosen:
            if not arms.children and arms.parent is not None and arms.node.finished:
                arms.close()

    def best_open(self) -> Node:
        """The unfinished node without children of the largest value; the root where there is none."""
        leaves = [arms.node for arms in self._arms.values() if not arms.node.finished and not arms.children]
        return max((leaf for leaf in leaves if leaf.parent is not None), key=value_of, default=self.root.node)

    def _plant(self, end: Node, policy: str | None) -> None:
        """Add the chain that ends here, and tell every arm that leads to it."""
        new: list[Node] = []
        node: Node | None = end
        while node is not None and node not in self._arms:
            new.append(node)
            node = node.parent
        base = arms = self._arms[node or self.root.node]
        draw, pooled, depth = self._thompson, self._pooled, end.depth
        score = draw.seen(value_of(end), depth, value_of(end) - base.score, depth - base.node.depth)
        draw.add(base.moments, GEN + self._policies.index(policy), score, depth)
        for node in reversed(new):
            if pooled and arms is not base:
                draw.add(arms.moments, CONT, score, depth)
            own = score if node is end else draw.finite(value_of(node))
            child = self._arms[node] = _Arms(node, arms, len(self._policies), own)
            draw.add(arms.moments, child.row, score, depth)
            arms = child
        while base.parent is not None:
            draw.add(base.parent.moments, base.row, score, depth)
            if pooled:
                draw.add(base.parent.moments, CONT, score, depth)
            base = base.parent
