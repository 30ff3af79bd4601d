"""Beam search that ranks a step by where it leads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..checks import flag, is_one_of
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct
from .beam import Slots, value_of


@dataclass(frozen=True)
class Lookahead:
    """Beam whose steps are ranked by the values at the ends of short rollouts beyond them (arXiv 2408.03314, sec. 5).

    Each unfinished child gets `rollouts` continuations of `steps` steps; the mean or the maximum of the values at their
    ends becomes its value (its q stays what it is). With "policy" it is their mean weighted by the policy's probability
    of each different rollout, before temperature and filters: the expectation under the policy, over the rollouts seen.

    Rollouts are drawn once. When a child is kept, the first steps of all its rollouts are its first children and join
    the next selection. Further steps serve the rollouts of those children, and only the children still missing are
    drawn. An answer that a rollout completes is a candidate.

    With `greedy`, as in search-and-learn (`lookahead` there), the one rollout takes the most probable tokens, and since
    it is no draw of the policy it only gives the value: children are drawn anew.

    Duplicates share a node and pool their rollouts.

    Args:
        width, expansions, per_parent, merge, value: as in Beam.
        steps: how far a rollout goes, in steps.
        rollouts: rollouts of each child.
        reduce: "mean", "max" or "policy" (weighted mean) of the values at their ends.
        greedy: rollouts of the most probable tokens, one a child.

    Raises:
        ValueError: a number is below 1, reduce is unknown, greedy comes with several rollouts, or no value has this
            name.
    """

    width: int = 4
    expansions: int = 4
    steps: int = 1
    rollouts: int = 1
    reduce: Literal["mean", "max", "policy"] = "mean"
    per_parent: int | None = None
    merge: bool = True
    value: Value | str | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        flag("merge", self.merge)
        flag("greedy", self.greedy)
        for name in ("width", "expansions", "steps", "rollouts"):
            at_least(name, getattr(self, name))
        if self.per_parent is not None:
            at_least("per_parent", self.per_parent)
        if not is_one_of(self.reduce, ("mean", "max", "policy")):
            raise ValueError(f"reduce={self.reduce!r}: it is 'mean', 'max' or 'policy'")
        if self.greedy and self.rollouts > 1:
            raise ValueError(f"rollouts={self.rollouts!r}: greedy rollouts are all the same, so 1 is needed")
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        slots = Slots(self.width, self.per_parent)
        drawn = yield Expand([root], self.width * self.expansions, merge=self.merge, alive=[root])
        while True:
            slots.finished += yield from self._look(drawn)
            live = slots.select(drawn)
            if not live:
                return distinct(slots.finished)
            cached = [] if self.greedy else [child for node in distinct(live) for child in node.children]
            for child in cached:
                child.rollout = False
            missing = [self.expansions if self.greedy else max(0, self.expansions - node.drawn) for node in live]
            fresh = yield Expand(live, missing, merge=self.merge, alive=live)
            drawn = [*places(cached), *fresh]

    def _look(self, drawn: Sequence[Node]) -> Run:
        """Roll out every unfinished node, set its value, and return the answers that rollouts completed."""
        nodes = [node for node in distinct(drawn) if not node.finished]
        tips = nodes
        for depth in range(self.steps):
            wanted = self.rollouts if depth == 0 else 1
            need = places([tip for tip in tips if not tip.finished])
            missing = [wanted - tip.drawn for tip in need]
            yield Expand(need, missing, rollout=True, merge=self.merge, alive=nodes, greedy=self.greedy)
            tips = [child for tip in tips for child in tip.children]
        completed: list[Node] = []
        for node in nodes:
            ends = _ends(node, self.steps)
            if not ends:
                continue  # the budget let it have no rollout: its own value stands
            values = [value_of(end) for end in places(ends)]
            if self.reduce == "policy":
                node.value = _expected(node, ends)
            else:
                node.value = max(values) if self.reduce == "max" else sum(values) / len(values)
            completed += [end for end in ends if end.finish == "stop"]
        for end in completed:
            for step in end.path():
                step.rollout = False
        return completed


def _expected(node: Node, ends: Sequence[Node]) -> float:
    """The mean of the values at distinct rollouts' ends, weighted by the policy's probability of each rollout.

    Raises:
        ValueError: the policy recorded no log-probabilities.
    """
    weights: dict[tuple[int, ...], tuple[float, float]] = {}  # equal rollouts may lie on several nodes
    for end in ends:
        beyond = end.path()[node.depth :]
        parts = [part.logprobs for part in beyond if part.logprobs is not None]
        if len(parts) < len(beyond):
            raise ValueError("reduce='policy' needs the policy's log-probabilities, and this one records none")
        tokens = tuple(token for part in beyond for token in part.token_ids)
        weights[tokens] = (sum(float(part.sum(dtype=np.float64)) for part in parts), value_of(end))
    top = max(logprob for logprob, _ in weights.values())
    shares = [(math.exp(logprob - top) if logprob > -math.inf else 0.0, value) for logprob, value in weights.values()]
    total = math.fsum(share for share, _ in shares)
    return math.fsum(share * value for share, value in shares if share) / total if total else value_of(ends[0])


def _ends(node: Node, steps: int) -> list[Node]:
    """The last nodes of the rollouts below a node, at most `steps` steps away; none where there are no rollouts."""
    ends: list[Node] = []
    level = node.children
    for depth in range(1, steps + 1):
        ends += [tip for tip in level if depth == steps or not tip.children]
        level = [child for tip in level for child in tip.children]
    return ends


def places(nodes: Sequence[Node]) -> list[Node]:
    """Every node as often as it was drawn."""
    return [node for node in nodes for _ in range(node.count)]
