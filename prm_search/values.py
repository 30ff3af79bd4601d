"""Values: the number a strategy ranks a node by, from the rewards on its path.

A value is any function of a node. Rewards are in beta * nats, of the tree's primary pair unless a pair is named.
Another beta > 0 rescales every value here but Advantage, so it changes no ranking. The root, which is all that a
search starts with, has value 0 under each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from .checks import number
from .tree import Node

Value = Callable[[Node], float]


class Scored(Protocol):
    """The part of a node that values read, so that they are defined for any scored step: see `along`."""

    @property
    def reward(self) -> float:
        """Reward of the step."""
        ...

    @property
    def q(self) -> float:
        """Sum of rewards up to the step's end."""
        ...

    @property
    def depth(self) -> int:
        """Steps up to this one."""
        ...

    @property
    def end(self) -> int:
        """Response tokens up to the step's end."""
        ...

    def path(self) -> Sequence[Scored]:
        """The steps from the first to this one."""
        ...


def q(node: Scored) -> float:
    """Sum of token rewards so far: q_t = sum_{i<=t} beta * log(pi_phi(y_i | y_<i) / pi_ref(y_i | y_<i)).

    Source: arXiv 2412.01981, eq. 2: the soft expectation of the outcome reward when the reference goes on from here. So
    prefixes of one prompt compare at any depth. At the end of a response it is the outcome reward.
    """
    return node.q


def last(node: Scored) -> float:
    """Reward of the last step: q here minus q at its parent.

    Source: arXiv 2412.01981, eq. 3. Ranks siblings as q does, and nodes of different parents by progress alone.
    """
    return node.reward


def minimum(node: Scored) -> float:
    """Smallest step reward on the path, min_s r_s ("min").

    Source: the selector of Math-Shepherd (arXiv 2312.08935) on the step rewards of arXiv 2412.01981, eq. 3;
    "single" rewards with "min" in the latter's released evaluation.
    """
    return min((step.reward for step in node.path()), default=0.0)


def product(node: Scored) -> float:
    """Product of the step rewards on the path, prod_s r_s ("prod"): for step scores in [0, 1], which it needs.

    Source: Let's Verify Step by Step (arXiv 2305.20050), where it is the probability that every step is right. It is
    computed as exp(sum_s log r_s), so that long paths of small scores keep their order down to fp64's range.

    Raises:
        ValueError: a step reward is negative.
    """
    rewards = [step.reward for step in node.path()]
    if any(reward < 0 for reward in rewards):
        raise ValueError(f"value='prod' needs step scores >= 0, such as a step PRM's; got {min(rewards)!r}")
    if not rewards:
        return 0.0
    return 0.0 if 0.0 in rewards else math.exp(math.fsum(map(math.log, rewards)))


def mean(node: Scored) -> float:
    """Mean step reward on the path, q over the number of steps."""
    return node.q / max(node.depth, 1)


def prefix_mean(node: Scored) -> float:
    """q over the number of response tokens so far: the length-normalised prefix value.

    Source: IPVRM (arXiv 2604.13197), v_t = beta * sum_{i<=t} log-ratio_i / t, on which such pairs are trained.
    """
    return node.q / max(node.end, 1)


def min_q(node: Scored) -> float:
    """Smallest q at the end of any step on the path, min_s q_s.

    Source: "accumulative" rewards with "min" in the released evaluation of arXiv 2412.01981.
    """
    return min((step.q for step in node.path()), default=0.0)


@dataclass(frozen=True)
class Advantage:
    """Q + alpha * A: the value of the prefix plus the progress that its last step made under a second pair.

    Source: process advantage verifiers (PAV, arXiv 2410.08146): Q under the policy, A(s_h, a_h) = Q(s_h, a_h) -
    Q(s_{h-1}, a_{h-1}) under a prover. With implicit pairs both Qs are cumulative log-ratios, so A is the step
    reward under the prover's pair.

    Args:
        alpha: weight of A; the two pairs' rewards are each in their own beta * nats, so it also sets their scale.
        prover: name of the pair that gives A, or None for the primary pair's own step reward.
        value: Q.

    Raises:
        ValueError: alpha is not finite; or, when called, the prover has not scored the node.
        TypeError: prover is not a string, or value is neither a name nor a function.
    """

    alpha: float = 1.0
    prover: str | None = "prover"
    value: Value = q

    def __post_init__(self) -> None:
        number("alpha", self.alpha, "a finite number", math.isfinite)
        if self.prover is not None and not isinstance(self.prover, str):
            kind = type(self.prover).__name__
            raise TypeError(f"prover must be the name of a scorer (scorer.name) or None, got {kind}")
        object.__setattr__(self, "value", resolve_value(self.value))

    def __call__(self, node: Node) -> float:
        """The value of a node that both pairs have scored."""
        name = node.tree.primary if self.prover is None else self.prover
        if not node.scored_by(name):
            scored = ", ".join(map(repr, node.rewards)) or "none"
            raise ValueError(
                f"prover={name!r} has not scored this node (pairs that have: {scored}); a search takes it as prover="
            )
        return self.value(node) + self.alpha * node.reward_of(name)


VALUES: Mapping[str, Callable[[Scored], float]] = MappingProxyType(
    {"q": q, "last": last, "min": minimum, "prod": product, "mean": mean, "prefix_mean": prefix_mean, "min_q": min_q}
)


def resolve_value(value: str | Value) -> Value:
    """The value of that name, or the callable itself.

    Raises:
        ValueError: no value has this name.
        TypeError: neither a name nor callable.
    """
    if isinstance(value, str):
        if value not in VALUES:
            raise ValueError(f"value={value!r} is unknown; it is one of {sorted(VALUES)} or a function of a node")
        return VALUES[value]
    if not callable(value):
        raise TypeError(f"value must be one of {sorted(VALUES)} or a function of a node, got {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class _Step:
    """A scored step of no tree."""

    reward: float
    q: float
    depth: int
    end: int
    steps: list[_Step]

    def path(self) -> list[_Step]:
        return self.steps[: self.depth]


def along(value: str, step_rewards: Sequence[float] | np.ndarray, step_ends: Sequence[int] | np.ndarray) -> np.ndarray:
    """A value at the end of every step of a response, from the rewards of its steps.

    Args:
        value: a name of VALUES.
        step_rewards: [S] beta * nats, first step to last.
        step_ends: [S] response tokens up to each step's end, rising.

    Returns:
        [S] float64; the last is the value of the whole response.

    Raises:
        ValueError: the value is unknown, or the lengths differ.
    """
    if value not in VALUES:
        raise ValueError(f"value={value!r} is unknown; it is one of {sorted(VALUES)}")
    if len(step_rewards) != len(step_ends):
        raise ValueError(f"step_rewards has {len(step_rewards)} steps and step_ends {len(step_ends)}")
    steps: list[_Step] = []
    total = 0.0
    for depth, (reward, end) in enumerate(zip(step_rewards, step_ends, strict=True), 1):
        total += float(reward)
        steps.append(_Step(float(reward), total, depth, int(end), steps))
    return np.array([VALUES[value](step) for step in steps], np.float64)


def step_rewards(node: Node, pair: str | None = None) -> np.ndarray:
    """Step rewards along a node's path.

    Args:
        node: its path ends here.
        pair: name of the pair; None for the tree's primary one.

    Returns:
        [S] float64, beta * nats, first step to last; they sum to q.

    Raises:
        KeyError: the pair has not scored the path.
    """
    name = node.tree.primary if pair is None else pair
    return np.array([step.reward_of(name) for step in node.path()], dtype=np.float64)


def step_q(node: Node, pair: str | None = None) -> np.ndarray:
    """q at the end of each step along a node's path: [S] float64, beta * nats. Arguments as in step_rewards."""
    name = node.tree.primary if pair is None else pair
    return np.array([step.q_of(name) for step in node.path()], dtype=np.float64)


def step_ends(node: Node) -> np.ndarray:
    """Response tokens up to the end of each step along a node's path: [S] int64, rising."""
    return np.array([step.end for step in node.path()], dtype=np.int64)
