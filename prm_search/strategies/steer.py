"""Steering every token by the reward, or those of which the policy is unsure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ..checks import is_one_of, number, strength
from ..policy import AsyncPolicyBase, PolicyBase
from ..sampling import Doubt
from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, Strategy, at_least, distinct
from .best_of_n import BestOfN


@dataclass(frozen=True)
class Steer:
    """One answer (or n) whose tokens are steered: at every token, or only where the policy is unsure of the next.

    With `alpha`, tokens are drawn from policy logits + alpha * (log pi_phi - log pi_ref): short for BestOfN(n) over
    `Steered(policy, pair, alpha)`. Wrap the policy yourself to use another strategy with it.

    With `candidates`, the scorer takes the token instead: of so many of the policy's most probable ones, the one whose
    step reward is highest. That is AdaptiveStep's token-level value-guided decoding (arXiv 2502.13943, section 3),
    with `below` as its threshold. A pair over an HFPolicy has the candidates' rewards in the rows that are decoded
    anyway, and they cost nothing. Under any other scorer, or policy, a step ends before each unsure token, and each
    candidate is a node of one token, which is scored. So `value` ranks the answers, and takes no part in the choice.

    AdaptiveStep calls the probability of the token that was drawn the policy's confidence, and its threshold is the
    lowest 2 % of those in responses of the policy: `confidence_of="drawn"`, and `confidence.confidence_threshold` finds
    it. The default, ours, is the probability of the most probable token, which does not depend on the draw.

    Args:
        alpha: strength; 0 leaves the policy as it is. Of no use with candidates.
        n: answers to sample.
        value: what to rank them by; None for q.
        below: act only where the policy's confidence is below this probability, in (0, 1]; None for everywhere.
        candidates: tokens that the scorer chooses among; None to steer by alpha.
        confidence_of: "top" or "drawn"; see above.

    Raises:
        ValueError: alpha is not in [-1e6, 1e6], another number is out of range, or a name is unknown.
        TypeError: alpha or below is not a number.
    """

    alpha: float = 1.0
    n: int = 1
    value: Value | str | None = None
    below: float | None = None
    candidates: int | None = None
    confidence_of: Literal["top", "drawn"] = "top"

    def __post_init__(self) -> None:
        at_least("n", self.n)
        strength("alpha", self.alpha)
        if self.value is not None:
            resolve_value(self.value)
        if self.below is not None:
            number("below", self.below, "a probability in (0, 1] or None", lambda x: 0 < x <= 1)
        if self.candidates is not None:
            at_least("candidates", self.candidates, 2)
        if not is_one_of(self.confidence_of, ("top", "drawn")):
            raise ValueError(f"confidence_of={self.confidence_of!r}: it is 'top' or 'drawn'")

    def wrap(self, policy: Any, pair: Any) -> Any:
        """Return the steered policy; with candidates that have to be nodes, the policy itself.

        Args:
            policy: an HFPolicy that is not steered yet; with candidates, any policy that answers ranked requests.
            pair: an ImplicitPRM; with candidates, any scorer.

        Raises:
            ValueError: the pair is missing, or the policy is steered already.
            TypeError: the policy is not an HFPolicy.
        """
        if pair is None:
            raise ValueError("strategy=Steer(...) needs scorer=, the pair to steer by")
        own = PolicyBase.of(policy)
        if own.alpha is not None:
            raise ValueError("strategy=Steer(...) with a Steered policy would steer twice: use BestOfN(1) with it")
        if self.candidates is None:
            return own.steered(pair, self.alpha, self.below, None, self.confidence_of)
        try:
            return own.steered(pair, self.alpha, self.below, self.candidates, self.confidence_of)
        except (TypeError, ValueError):  # no pair with the policy's tokens, or a policy without rows of ours
            return policy

    def over(self, policy: PolicyBase | AsyncPolicyBase) -> Strategy:
        """Return the strategy that does this over a policy as `wrap` returned it.

        Raises:
            ValueError: the policy is not steered so, or cannot tell the candidates.
        """
        plain = self.below is None and self.candidates is None
        if policy.alpha is not None:
            if (policy.alpha, policy.choice) == (
                self.alpha, None if plain else (self.below, self.candidates, self.confidence_of)
            ):  # fmt: skip
                return BestOfN(self.n, self.value)
        elif self.candidates is not None:
            if not policy.ranks or policy.top_tokens < self.candidates:
                tells = policy.top_tokens if policy.ranks else "no"
                raise ValueError(f"candidates={self.candidates}: this policy offers {tells} most probable tokens")
            return self
        raise ValueError("strategy=Steer(...) here needs policy=strategy.wrap(policy, pair)")

    def run(self, root: Node) -> Run:
        if self.candidates is None:
            return (yield from BestOfN(self.n, self.value).run(root))
        doubt = None if self.below is None else Doubt(self.below, self.confidence_of)
        finished: list[Node] = []
        places, answers = [root], [self.n]  # where answers go on, and how many
        while places:
            unsure: Counter[Node] = Counter()
            if doubt is None:  # every token is chosen
                for node, count in zip(places, answers, strict=True):
                    unsure[node] += count
                places, answers = [], []
            else:
                before = set(places)
                drawn = yield Expand(places, answers, doubt=doubt, alive=places)
                finished += [node for node in drawn if node.finished]
                unsure.update(node for node in drawn if node in before and not node.finished)
                places = [node for node in drawn if not node.finished and node not in before]
                answers = [1] * len(places)
            if unsure:
                for chosen, count in (yield from self._choose(unsure, places)):
                    if chosen.finished:
                        finished.append(chosen)
                    else:
                        places.append(chosen)
                        answers.append(count)
        return distinct(finished)

    def _choose(self, unsure: Counter[Node], others: list[Node]) -> Any:
        """The scorer's choice of the next token for each of these nodes, with the number of answers that go on there.
        A node that the budget let have no candidates stands for itself."""
        nodes = list(unsure)
        ranked = yield Expand(
            nodes, self.candidates or 0, rollout=True, merge=False, ranked=True, alive=[*nodes, *others]
        )
        below: dict[Node, list[Node]] = {node: [] for node in nodes}
        for child in ranked:
            below[child.parent if child.parent in below else child].append(child)
        chosen = []
        for node, children in below.items():
            if not children:
                continue
            best = max(children, key=lambda child: 0.0 if child is node else child.reward)  # first of equals
            if best is not node:
                best.rollout = False
                best.lineages *= unsure[node] if best.finished else 1
            chosen.append((best, unsure[node]))
        return chosen
