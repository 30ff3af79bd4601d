"""Statistics of the nodes that a Monte Carlo tree search has met: visits, values, and what is left to explore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ..tree import Node
from .beam import value_of

# Selection rule -> its constant of exploration, for values in [0, 1]. See MCTS for the rules' formulas.
EXPLORATION: Mapping[str, float] = MappingProxyType({"puct": 0.3, "uct": 0.3, "rest": 0.7})


class Statistics:
    """One node of the search.

    Attributes:
        node, parent, children: the tree; children are distinct nodes, in order of creation.
        visits: simulations that went through it, and its own evaluation.
        total: sum of what they found, in the unit of the values.
        top: the largest of it.
        prior: the policy's probability among its siblings.
        open: whether it, or something below it, may still be expanded.
        pending: leaves below it (or itself) whose children are being drawn.
        outlook: what a rollout from it found; None for its own value.
    """

    __slots__ = ("children", "node", "open", "outlook", "parent", "pending", "prior", "top", "total", "visits")

    def __init__(self, node: Node, parent: Statistics | None, value: float, prior: float) -> None:
        self.node, self.parent, self.prior = node, parent, prior
        self.children: list[Statistics] = []
        self.visits, self.total, self.top = 1, value, value
        self.open = not node.finished
        self.pending = 0
        self.outlook: float | None = None

    def best_child(self) -> Statistics | None:
        """Return the child of largest own value, the first of equals; None where it has none."""
        return max(self.children, key=lambda child: child.top, default=None)


class StatisticsTree:
    """The statistics of a search, from the root.

    Args:
        root: of the search.
        rule, exploration, backup: see MCTS.
    """

    def __init__(self, root: Node, rule: str, exploration: float, backup: str) -> None:
        self.root = Statistics(root, None, 0.0, 1.0)
        self.rule, self.exploration, self.backup = rule, exploration, backup
        self._low, self._high = math.inf, -math.inf

    # -- choosing -----------------------------------------------------------------------------------------------------

    def choose(self, n: int) -> list[Statistics]:
        """Choose up to n leaves, each under the virtual loss of those before it, and mark them as pending."""
        leaves: list[Statistics] = []
        while len(leaves) < n and self.root.open:
            leaf = self.root
            while leaf.children:
                leaf = self._best_open(leaf)
            leaves.append(leaf)
            leaf.open = False  # chosen once a round
            for above in _upward(leaf):
                above.pending += 1
            self._refresh(leaf.parent)
        return leaves

    def best_leaf(self) -> Statistics:
        """Walk down by Q alone, to a leaf that is not finished."""
        leaf = self.root
        while going := [child for child in leaf.children if not child.node.finished]:
            leaf = max(going, key=self._q)
        return leaf

    def _best_open(self, parent: Statistics) -> Statistics:
        return max((child for child in parent.children if child.open), key=lambda child: self._score(parent, child))

    def _score(self, parent: Statistics, child: Statistics) -> float:
        tries, visits = parent.visits + parent.pending, child.visits + child.pending
        # A pending simulation is one that found the lowest value.
        value = self._q(child) * (child.visits / visits)
        if self.rule == "puct":
            return value + self.exploration * child.prior * math.sqrt(tries) / (1 + visits)
        if self.rule == "uct":
            return value + self.exploration * math.sqrt(math.log(tries) / visits)
        if visits == 1:  # evaluated, never walked through: before all others, as in the released code
            return value + 1.0
        return value + self.exploration * math.sqrt(2 * math.log(tries) / visits)

    def _q(self, child: Statistics) -> float:
        """Return what a child promises, in [0, 1]."""
        raw = child.top if self.backup == "max" else child.total / child.visits
        if self.rule == "rest":
            return raw
        return 0.5 if self._high <= self._low else (raw - self._low) / (self._high - self._low)

    # -- growing ------------------------------------------------------------------------------------------------------

    def grow(self, leaf: Statistics) -> list[Statistics]:
        """Take a leaf's new children in, and return them. One that could have none is closed for good."""
        nodes = [child for child in leaf.node.children if child.value is not None]
        priors = _priors(nodes)
        leaf.children = [
            Statistics(node, leaf, self._seen(value_of(node)), prior) for node, prior in zip(nodes, priors, strict=True)
        ]
        leaf.open = any(child.open for child in leaf.children)
        return leaf.children

    def close(self, leaf: Statistics) -> None:
        """Never choose a leaf again: its node is finished."""
        leaf.open = False
        self._refresh(leaf.parent)

    def back_up(self, leaf: Statistics) -> None:
        """Tell a leaf and its ancestors what its simulation found, and end its virtual loss."""
        best = leaf.best_child()
        if best is not None and best.outlook is not None:
            best.outlook = self._seen(best.outlook)
            if self.rule == "rest":
                best.total = best.top = best.outlook
            else:
                best.total, best.top = best.total + best.outlook, max(best.top, best.outlook)
                best.visits += 1
        for above in _upward(leaf):
            above.pending -= 1
            if best is None:
                continue
            above.visits += 1
            above.top = max(child.top for child in above.children)
            if self.rule == "rest":  # its mean is of the children's values, each as often as it was visited
                mean = math.fsum(child.total for child in above.children) / sum(c.visits for c in above.children)
                above.total = mean * above.visits
            else:
                above.total += best.top if best.outlook is None else best.outlook
        self._refresh(leaf.parent)

    def _seen(self, value: float) -> float:
        """Take a value into the range, and return it; an infinite one becomes the range's nearest end."""
        if self.rule == "rest" and not 0 <= value <= 1:
            raise ValueError(
                f"rule='rest' needs values in [0, 1], such as a step PRM's scores by value='last', not {value!r}"
            )
        if math.isinf(value):
            ends = (self._low, self._high) if self._low <= self._high else (0.0, 0.0)
            return ends[value > 0]
        self._low, self._high = min(self._low, value), max(self._high, value)
        return value

    def _refresh(self, node: Statistics | None) -> None:
        """Set anew which ancestors are open."""
        while node is not None:
            node.open = any(child.open for child in node.children)
            node = node.parent


def _upward(leaf: Statistics) -> list[Statistics]:
    """The leaf and its ancestors."""
    chain: list[Statistics] = []
    node: Statistics | None = leaf
    while node is not None:
        chain.append(node)
        node = node.parent
    return chain


def _priors(nodes: list[Node]) -> list[float]:
    """The policy's probability of each sibling's tokens among them; their shares of the draws where it is unknown."""
    if not nodes:
        return []
    known = [None if node.logprobs is None else float(np.sum(node.logprobs, dtype=np.float64)) for node in nodes]
    logs = [log for log in known if log is not None and math.isfinite(log)]
    if len(logs) < len(nodes):
        draws = sum(node.count for node in nodes)
        return [node.count / draws for node in nodes]
    top = max(logs)
    shares = [math.exp(log - top) for log in logs]
    return [share / math.fsum(shares) for share in shares]
