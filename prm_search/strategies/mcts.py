"""Monte Carlo tree search over reasoning steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..checks import flag, is_one_of, number
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct
from .beam import value_of
from .mcts_tree import EXPLORATION, Statistics, StatisticsTree

Rule = Literal["puct", "uct", "rest"]


@dataclass(frozen=True)
class MCTS:
    """Walk from the root to a leaf by value and curiosity, expand the leaf, and tell its ancestors what was found.

    A simulation draws `expansions` children of one leaf; each child counts as visited once, with its own value. The
    result of a simulation is the best new child's value, or the value at the end of a rollout from that child.
    Ancestors back the result up by their mean or their maximum. Finished children are never walked to again, nor are
    subtrees in which all is finished. The answer is chosen among all finished nodes; where no simulation reached one,
    the best leaf is sampled to the end.

    A node that N simulations went through may have expansions * floor(N ** widening) children (progressive widening:
    R. Coulom, "Computing Elo ratings of move patterns in the game of Go", 2007): the next of them draws `expansions`
    more. So does one below which all is finished. Steps of a language model are drawn, not listed, so the right one may
    not be among the first few, and a tree that never draws again cannot find it.

    Values enter the rules on a scale of [0, 1]: Q = (v - low) / (high - low) between the lowest and the highest value
    seen in the tree so far (J. Schrittwieser et al., "MuZero", arXiv 1911.08265, eq. 5), whatever the scorer. Prefixes
    of different depth are compared. So a value that falls with the depth, as q does, makes a search broad; value="min"
    or "mean" makes a search deep.

    Rules, over a child with n visits of a parent with N:
        puct: Q + c P sqrt(N) / (1 + n), P the policy's probability of the step among its siblings (D. Silver et al.,
            "Mastering the game of Go without human knowledge", 2017).
        uct: Q + c sqrt(ln N / n) (L. Kocsis, C. Szepesvari, ECML 2006).
        rest: Q + c sqrt(2 ln N / n), or Q + 1 where n = 0, values as they are, which must lie in [0, 1]; the value of a
            rolled-out child becomes
            (1 - alpha) v + alpha max(v of its rollout); and the search ends when a value reaches `end_gate`
            (ReST-MCTS*, arXiv 2406.03816, and its released code, where expansions=3, rollout_steps=3).

    Args:
        simulations: leaves expanded, at most.
        expansions: children of each.
        rule: see above.
        exploration: c; None for the rule's own, which is .3 for puct and uct and .7 for rest.
        backup: "mean" of the simulations below a node, or the "max" of the values.
        rollout_steps: greedy steps beyond the best new child of each leaf; 0 for none.
        leaves: leaves expanded at once. Each leaf that is chosen counts as a visit without a value until its children
            are there (virtual loss: G. Chaslot et al., 2008), so that the next choice differs and batches stay full.
        widening: in [0, 1]; see above. 0: a node's children are drawn once.
        alpha: of the rule "rest".
        end_gate: of the rule "rest".
        merge: count equal children on one node.
        value: what to rank by; None for what the search ranks by.

    Raises:
        ValueError: a number is out of range, a name is unknown; or, while it runs, rule="rest" meets a value outside
            [0, 1].
        TypeError: a number is of another type.
    """

    simulations: int = 32
    expansions: int = 4
    rule: Rule = "puct"
    exploration: float | None = None
    backup: Literal["mean", "max"] = "mean"
    rollout_steps: int = 0
    leaves: int = 4
    widening: float = 0.5
    alpha: float = 0.5
    end_gate: float = 0.9
    merge: bool = True
    value: Value | str | None = None

    def __post_init__(self) -> None:
        flag("merge", self.merge)
        for name in ("simulations", "expansions", "leaves"):
            at_least(name, getattr(self, name))
        at_least("rollout_steps", self.rollout_steps, 0)
        if not is_one_of(self.rule, EXPLORATION):
            raise ValueError(f"rule={self.rule!r} is unknown; it is one of {', '.join(sorted(EXPLORATION))}")
        if not is_one_of(self.backup, ("mean", "max")):
            raise ValueError(f"backup={self.backup!r}: it is 'mean' or 'max'")
        if self.exploration is not None:
            number("exploration", self.exploration, "a finite number >= 0", lambda value: 0 <= value < math.inf)
        for name in ("alpha", "end_gate", "widening"):
            number(name, getattr(self, name), "a number in [0, 1]", lambda value: 0 <= value <= 1)
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        exploration = EXPLORATION[self.rule] if self.exploration is None else self.exploration
        tree = StatisticsTree(root, self.rule, exploration, self.backup, self.widening)
        finished: list[Node] = []
        done = 0
        while done < self.simulations and tree.root.open:
            leaves = tree.choose(min(self.leaves, self.simulations - done))
            done += len(leaves)
            fresh = yield from self._expand(tree, leaves)
            fresh += yield from self._roll_out(tree, leaves)
            finished += fresh
            for leaf in leaves:
                tree.back_up(leaf)
            if self.rule == "rest" and any(value_of(node) >= self.end_gate for node in fresh):
                break
        if not finished:
            end = tree.best_leaf().node
            finished += yield Expand([end], 1, until="end", merge=self.merge, alive=[end])
        return distinct(finished)

    def _expand(self, tree: StatisticsTree, leaves: Sequence[Statistics]) -> Run:
        """Draw children of the leaves, those that rollouts drew before counted, and return the finished ones."""
        nodes = [leaf.node for leaf in leaves]
        for node in nodes:
            for child in node.children:
                child.rollout = False
        missing = [max(0, self.expansions * (leaf.rounds + 1) - leaf.node.drawn) for leaf in leaves]
        yield Expand(nodes, missing, merge=self.merge, alive=[tree.root.node])
        finished: list[Node] = []
        for leaf in leaves:
            if leaf.node.finished:  # the budget let it have no child
                finished.append(leaf.node)
            children = tree.grow(leaf)
            finished += [child.node for child in children if child.node.finished]
        return finished

    def _roll_out(self, tree: StatisticsTree, leaves: Sequence[Statistics]) -> Run:
        """Go on greedily from the best new child of each leaf, and return the answers that this completed."""
        begun = [best for leaf in leaves if (best := leaf.best_new()) is not None and best.open]
        tips = {best: best.node for best in begun} if self.rollout_steps else {}
        for _ in range(self.rollout_steps):
            going = {best: tip for best, tip in tips.items() if not tip.finished}
            fresh = [tip for tip in going.values() if not tip.children]
            if fresh:
                yield Expand(fresh, 1, rollout=True, merge=self.merge, alive=[tree.root.node])
            for best, tip in going.items():
                if tip.children:
                    tips[best] = max(tip.children, key=value_of)
        completed: list[Node] = []
        for best, tip in tips.items():
            if tip is best.node:
                if tip.finished:  # the budget let it have no rollout
                    tree.close(best)
                    completed.append(tip)
                continue
            beyond = tip.path()[best.node.depth :]
            best.outlook = max(value_of(node) for node in beyond) if self.rule == "rest" else value_of(tip)
            if self.rule == "rest":
                best.outlook = (1 - self.alpha) * value_of(best.node) + self.alpha * best.outlook
            if tip.finish == "stop":
                for step in tip.path():
                    step.rollout = False
                completed.append(tip)
        return completed
