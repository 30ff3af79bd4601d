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
        new: place of the first child that its last expansion drew.
        met: how many of its node's children were looked at.
        rounds: how often it was expanded.
        visits: simulations that went through it, and its own evaluation.
        total: sum of what they found, in the unit of the values.
        top: the largest of it.
        prior: the policy's probability among its siblings.
        open: whether it, or something below it, may still be expanded.
        busy: its children are being drawn.
        full: it can have no further child.
        pending: leaves below it (or itself) whose children are being drawn.
        outlook: what a rollout from it found; None for its own value.
    """

    __slots__ = (
        "busy", "children", "full", "met", "new", "node", "open", "outlook", "parent", "pending", "prior", "rounds",
        "top", "total", "visits",
    )  # fmt: skip

    def __init__(self, node: Node, parent: Statistics | None, value: float, prior: float) -> None:
        self.node, self.parent, self.prior = node, parent, prior
        self.children: list[Statistics] = []
        self.visits, self.total, self.top = 1, value, value
        self.new, self.met, self.rounds, self.pending = 0, 0, 0, 0
        self.open, self.busy, self.full = not node.finished, False, node.finished
        self.outlook: float | None = None

    def best_new(self) -> Statistics | None:
        """Return the newest children's largest by own value, the first of equals; None where there are no children.

        Where the newest draws were steps that were there already, it is the largest of all children."""
        return max(self.children[self.new :] or self.children, key=lambda child: child.top, default=None)


class StatisticsTree:
    """The statistics of a search, from the root.

    Args:
        root: of the search.
        rule, exploration, backup, widening: see MCTS.
    """

    def __init__(self, root: Node, rule: str, exploration: float, backup: str, widening: float) -> None:
        self.root = Statistics(root, None, 0.0, 1.0)
        self.rule, self.exploration, self.backup, self.widening = rule, exploration, backup, widening
        self._low, self._high = math.inf, -math.inf

    # -- choosing -----------------------------------------------------------------------------------------------------

    def choose(self, n: int) -> list[Statistics]:
        """Choose up to n leaves, each under the virtual loss of those before it, and mark them as pending."""
        leaves: list[Statistics] = []
        while len(leaves) < n and self.root.open:
            leaf = self.root
            while leaf.children and not self._widens(leaf) and (below := self._best_open(leaf)) is not None:
                leaf = below
            leaves.append(leaf)
            leaf.busy = True  # chosen once a round
            for above in _upward(leaf):
                above.pending += 1
            self._refresh(leaf)
        return leaves

    def _widens(self, node: Statistics) -> bool:
        """Return True if the next simulation through a node draws further children of it."""
        if node.busy or node.full or not self.widening:
            return False
        return node.rounds < int((node.visits - 1 + node.pending) ** self.widening + 1e-9)

    def best_leaf(self) -> Statistics:
        """Walk down by Q alone, to a leaf that is not finished."""
        leaf = self.root
        while going := [child for child in leaf.children if not child.node.finished]:
            leaf = max(going, key=self._q)
        return leaf

    def _best_open(self, parent: Statistics) -> Statistics | None:
        """The open child to walk to; None where there is none."""
        tries = parent.visits + parent.pending
        spread = tries if self.rule == "puct" else math.log(tries) if self.rule == "uct" else 2 * math.log(tries)
        curiosity = self.exploration * math.sqrt(spread)
        best, top = None, -math.inf
        for child in parent.children:
            if child.open and (score := self._score(child, curiosity)) > top:
                best, top = child, score
        return best

    def _score(self, child: Statistics, curiosity: float) -> float:
        visits = child.visits + child.pending
        # A pending simulation is one that found the lowest value.
        value = self._q(child) * (child.visits / visits)
        if self.rule == "puct":
            return value + curiosity * child.prior / (1 + visits)
        if self.rule == "rest" and visits == 1:  # evaluated, never walked through: first, as in the released code
            return value + 1.0
        return value + curiosity / math.sqrt(visits)

    def _q(self, child: Statistics) -> float:
        """Return what a child promises, in [0, 1]."""
        raw = child.top if self.backup == "max" else child.total / child.visits
        if self.rule == "rest":
            return raw
        return 0.5 if self._high <= self._low else (raw - self._low) / (self._high - self._low)

    # -- growing ------------------------------------------------------------------------------------------------------

    def grow(self, leaf: Statistics) -> list[Statistics]:
        """Take a leaf's new children in, and return them. A step that is there already is no new child. A leaf that
        could have none is closed for good."""
        leaf.new, leaf.busy = len(leaf.children), False
        leaf.rounds += 1
        there = {(child.node.token_ids, child.node.finish) for child in leaf.children}
        drawn = [node for node in leaf.node.children[leaf.met :] if node.value is not None]
        leaf.met, leaf.full = len(leaf.node.children), leaf.node.finished or not drawn
        for node in drawn:
            if (node.token_ids, node.finish) not in there:
                there.add((node.token_ids, node.finish))
                leaf.children.append(Statistics(node, leaf, self._seen(value_of(node)), 1.0))
        for child, prior in zip(leaf.children, _priors([child.node for child in leaf.children]), strict=True):
            child.prior = prior
        return leaf.children[leaf.new :]

    def close(self, leaf: Statistics) -> None:
        """Never choose a leaf again: its node is finished."""
        leaf.full = True
        self._refresh(leaf)

    def back_up(self, leaf: Statistics) -> None:
        """Tell a leaf and its ancestors what its simulation found, and end its virtual loss."""
        best = leaf.best_new()
        if best is not None and best.outlook is not None and best.visits == 1:
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
        self._refresh(leaf)

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
        """Set anew whether a node and its ancestors are open, as far up as that changes."""
        while node is not None:
            was = node.open
            node.open = not node.busy and not node.full and (not node.children or self.widening > 0)
            for child in node.children:
                if child.open:
                    node.open = True
                    break
            if node.open == was and node.children:
                break
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
