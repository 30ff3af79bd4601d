"""Steering every token by the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import strength
from ..policy import PolicyBase
from ..tree import Node
from ..values import Value, resolve_value
from .base import Run, at_least
from .best_of_n import BestOfN


@dataclass(frozen=True)
class Steer:
    """One answer (or n) sampled from policy logits + alpha * (log pi_phi - log pi_ref): sugar for BestOfN(n) over
    `Steered(policy, pair, alpha)`. Wrap the policy yourself to use another strategy with it.

    Args:
        alpha: strength; 0 leaves the policy as it is.
        n: answers to sample.
        value: what to rank them by; None for q.

    Raises:
        ValueError: alpha is not in [-1e6, 1e6], or n < 1.
        TypeError: alpha is not a number.
    """

    alpha: float = 1.0
    n: int = 1
    value: Value | str | None = None

    def __post_init__(self) -> None:
        at_least("n", self.n)
        strength("alpha", self.alpha)
        if self.value is not None:
            resolve_value(self.value)

    def wrap(self, policy: Any, pair: Any) -> Any:
        """Return the steered policy.

        Args:
            policy: an HFPolicy that is not steered yet.
            pair: an ImplicitPRM.

        Raises:
            ValueError: the pair is missing, or the policy is steered already.
            TypeError: the policy is not an HFPolicy.
        """
        if pair is None:
            raise ValueError("strategy=Steer(...) needs scorer=, the pair to steer by")
        own = PolicyBase.of(policy)
        if own.alpha is not None:
            raise ValueError("strategy=Steer(...) with a Steered policy would steer twice: use BestOfN(1) with it")
        return own.steered(pair, self.alpha)

    def run(self, root: Node) -> Run:
        return BestOfN(self.n, self.value).run(root)
