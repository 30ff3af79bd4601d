"""AB-MCTS-A: whether to go wider or deeper is drawn from what was found so far."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..checks import is_one_of
from ..rng import strategy_lineage
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct
from .beam import value_of

Prior = Literal["gaussian", "beta"]


@dataclass(frozen=True)
class AdaptiveBranch:
    """Draw each new child where Thompson sampling says: beside a node's children, or below one of them.

    Every node has two arms, GEN (a new child) and CONT (below a child), and each child an arm of its own. A walk from
    the root samples what each arm may give from its posterior and takes the larger, until it takes GEN. The score of
    the new child is an observation of that node's GEN. At each ancestor it is an observation of CONT and of the child
    on the way.
    Source: Y. Inoue et al., "Wider or Deeper? Scaling LLM Inference-Time Compute with Adaptive Branching Tree Search"
    (AB-MCTS-A, arXiv 2503.04412), and its released code (treequest), whose priors these are: normal-inverse-chi-square
    with m = 0, kappa = 1, nu = 1, tau^2 = .1, or Beta(1/2, 1/2).

    Values enter on a scale of [0, 1] between the lowest and the highest seen in the tree so far. There a node was a
    whole answer; here it is a step. With until="end" each draw goes on to the end of a response. Scores then compare
    whole answers, and a walk chooses the step from which the next answer branches off. until="step" draws single steps.

    With `policies`, several models share the search. Each of them is a GEN arm of its own at every node, which learns
    from the children that this model drew there; the search's policy is a PolicyPool that has these names.

    Args:
        draws: children drawn in all.
        prior: "gaussian" or "beta".
        until: "end" or "step"; see above.
        batch: walks at once, each from the same posterior, so that batches stay full.
        policies: names of policies, each an action; () for the search's only policy.
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

    def __post_init__(self) -> None:
        names = self.policies if isinstance(self.policies, str) else tuple(self.policies)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"policies={self.policies!r}: a list of names is needed")
        if len(set(names)) < len(names):
            raise ValueError(f"policies={self.policies!r}: each name once")
        object.__setattr__(self, "policies", names)  # hashable
        at_least("draws", self.draws)
        at_least("batch", self.batch)
        if not is_one_of(self.prior, ("gaussian", "beta")):
            raise ValueError(f"prior={self.prior!r}: it is 'gaussian' or 'beta'")
        if not is_one_of(self.until, ("end", "step")):
            raise ValueError(f"until={self.until!r}: it is 'end' or 'step'")
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        walks = _Walks(root, self.prior, self.policies or (None,))
        finished: list[Node] = []
        drawn = 0
        while drawn < self.draws and walks.root.open:
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


@dataclass
class _Moments:
    """The scores that an arm has given: number, sum and sum of squares of scores, in the unit of the values."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, score: float) -> None:
        self.n, self.total, self.squares = self.n + 1, self.total + score, self.squares + score * score


@dataclass(eq=False)
class _Arms:
    """A node's arms. `own` is its parent's arm for it; `open` says whether anything below can still be drawn."""

    node: Node
    parent: _Arms | None
    own: _Moments = field(default_factory=_Moments)
    gen: defaultdict[str | None, _Moments] = field(default_factory=lambda: defaultdict(_Moments))
    cont: _Moments = field(default_factory=_Moments)
    children: list[_Arms] = field(default_factory=list)
    open: bool = True


class _Walks:
    """The arms of a search, and the walks over them."""

    def __init__(self, root: Node, prior: Prior, policies: Sequence[str | None]) -> None:
        self._policies = policies
        self.root = _Arms(root, None)
        self._arms = {root: self.root}
        self._prior = prior
        tree = root.tree
        key = (tree.seed ^ tree.stream ^ strategy_lineage(2)) & (2**64 - 1)
        self._numbers = np.random.Generator(np.random.Philox(key=key))
        self._low, self._high = math.inf, -math.inf

    def choose(self) -> tuple[_Arms, str | None]:
        """Walk from the root to the node that gets a new child, and to the policy that draws it."""
        arms = self.root
        while True:
            going = [child for child in arms.children if child.open]
            several = going or len(self._policies) > 1
            worth = {name: self._sample(arms.gen[name]) for name in self._policies} if several else {}
            best = max(self._policies, key=lambda name: worth.get(name, 0.0))
            if not going or worth[best] >= self._sample(arms.cont):
                return arms, best
            arms = max(going, key=lambda child: self._sample(child.own))

    def learn(self, chosen: list[_Arms], ends: list[Node], policy: str | None) -> None:
        """Take in what this policy drew at these places, which ends with these nodes."""
        for end in ends:
            score = value_of(end)
            if not math.isfinite(score):
                score = (self._low if score < 0 else self._high) if self._low <= self._high else 0.0
            self._low, self._high = min(self._low, score), max(self._high, score)
            if end in self._arms:  # the budget let its place have no child
                self._close(self._arms[end])
                continue
            self._plant(end, score, policy)
        for arms in chosen:
            if not arms.children and arms.parent is not None and arms.node.finished:
                self._close(arms)

    def best_open(self) -> Node:
        """The unfinished node without children of the largest value; the root where there is none."""
        leaves = [arms.node for arms in self._arms.values() if not arms.node.finished and not arms.children]
        return max((leaf for leaf in leaves if leaf.parent is not None), key=value_of, default=self.root.node)

    def _plant(self, end: Node, score: float, policy: str | None) -> None:
        """Add the chain that ends here, and tell every arm that leads to it."""
        path = end.path()
        new = [node for node in path if node not in self._arms]
        base = self._arms[new[0].parent or self.root.node]
        base.gen[policy].add(score)
        for node in new:
            parent = self._arms[node.parent or self.root.node]
            arms = self._arms[node] = _Arms(node, parent, open=not node.finished)
            parent.children.append(arms)
            arms.own.add(score)
            if parent is not base:
                parent.cont.add(score)
        above = base
        while above.parent is not None:
            above.own.add(score)
            above.parent.cont.add(score)
            above = above.parent

    def _close(self, arms: _Arms) -> None:
        arms.open = False

    def _sample(self, moments: _Moments) -> float:
        """Return what an arm may give: one draw from its posterior, scores on the scale of [0, 1]."""
        n, width = moments.n, self._high - self._low
        if n == 0 or width <= 0:
            mean, spread = 0.5 * (n > 0), 0.0
        else:
            mean = (moments.total / n - self._low) / width
            spread = max(0.0, moments.squares / n - (moments.total / n) ** 2) / width**2
        if self._prior == "beta":
            good = n * min(max(mean, 0.0), 1.0)
            return float(self._numbers.beta(0.5 + good, 0.5 + n - good))
        kappa, nu = 1.0 + n, 1.0 + n
        centre = n * mean / kappa
        scale = (0.1 + n * spread + n * mean**2 / kappa) / nu
        variance = nu * scale / float(self._numbers.chisquare(nu))
        return centre + math.sqrt(variance / kappa) * float(self._numbers.standard_normal())
