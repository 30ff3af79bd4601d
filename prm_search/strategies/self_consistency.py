"""Self-consistency: answers vote, and no more are drawn than the vote needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..answers import Select
from ..answers.tally import Tally
from ..checks import is_one_of, number
from ..confidence import MEASURES, TOP_TOKENS, WINDOW, Measure, trace_confidence
from ..tree import Node
from .base import Expand, Run, at_least, distinct
from .prefix_vote import PrefixVote

STOPS = {"adaptive": 0.75, "beta": 0.95}  # and their thresholds


@dataclass(frozen=True)
class SelfConsistency:
    """Sample whole answers until their vote is decided. No scorer is needed; `select` is a vote unless the call says.

    Source: X. Wang et al., arXiv 2203.11171. `stop` says when the vote is decided:
        None: when n answers are drawn.
        "adaptive": at 2, 4, 8, ... draws, when the leading answer has 75 % of them (as its_hub's
            AdaptiveSelfConsistency).
        "beta": after any draw, when the leading answer has more votes than the second with a probability of 95 %, under
            the posterior Beta(v1 + 1, v2 + 1) of its share among the two (P. Aggarwal et al., "Let's Sample Step by
            Step", arXiv 2305.11860).
    What is decided depends on the draws in their order alone. So the answer is the same however many are drawn at once;
    what is still being drawn then is given up.

    With weight="confidence" each answer votes with the policy's confidence in it, and keep < 1 lets the surest share
    vote only (DeepConf offline, Y. Fu et al., arXiv 2508.15260, section 3); see `confidence.trace_confidence`. Both are
    weights (Node.weight), so select="weighted" reads them, which is then the default.

    Args:
        n: answers at most.
        stop: see above.
        weight: of a vote: None for 1, or "confidence".
        keep: share of the complete answers that vote, the surest ones; in (0, 1].
        threshold: the share of votes ("adaptive") or the probability ("beta") that decides; None for those above.
        wave: answers drawn at once; None for as few as can decide, which wastes no token. n is the fastest where there
            is room for all.
        measure, window: the confidence of an answer: "group", "bottom", "tail" or "mean", and the tokens of a group.
        top: most probable tokens that a token's confidence is the mean over.

    Raises:
        ValueError: a number is out of range, or a name is unknown.
        TypeError: keep or threshold is not a number.
    """

    n: int = 64
    stop: Literal["adaptive", "beta"] | None = None
    weight: Literal["confidence"] | None = None
    keep: float = 1.0
    threshold: float | None = None
    wave: int | None = None
    measure: Measure = "tail"
    window: int = WINDOW
    top: int = TOP_TOKENS

    def __post_init__(self) -> None:
        for name in ("n", "window", "top"):
            at_least(name, getattr(self, name))
        if self.wave is not None:
            at_least("wave", self.wave)
        if self.stop is not None and not is_one_of(self.stop, STOPS):
            raise ValueError(f"stop={self.stop!r}: it is None, 'adaptive' or 'beta'")
        if self.weight is not None and not is_one_of(self.weight, ("confidence",)):
            raise ValueError(f"weight={self.weight!r}: it is None or 'confidence'")
        if not is_one_of(self.measure, MEASURES):
            raise ValueError(f"measure={self.measure!r}: it is one of {', '.join(MEASURES)}")
        number("keep", self.keep, "a share in (0, 1]", lambda share: 0 < share <= 1)
        if self.threshold is not None:
            number("threshold", self.threshold, "a number in (0.5, 1) or None", lambda x: 0.5 < x < 1)

    @property
    def select(self) -> Select:
        """The choice among its candidates, where the call names none."""
        return "weighted" if self.confidence_tokens else "majority"

    @property
    def confidence_tokens(self) -> int:
        """See Sampling."""
        return 0 if self.weight is None and self.keep == 1 else self.top

    def run(self, root: Node) -> Run:
        ends: list[Node] = []
        if self.stop is None:
            ends = yield Expand([root], self.n, until="end", alive=[root])
        else:
            vote = _Vote(self.stop, self.threshold or STOPS[self.stop], Tally(root.tree.answer))
            while len(ends) < self.n and not vote.decided:
                more = min(self.wave or vote.least(), self.n - len(ends))
                drawn = yield Expand([root], more, until="end", merge=False, alive=[root], enough=vote.take)
                if not drawn:
                    break  # the budget ended
                ends = vote.cut([*ends, *drawn])
        ends = distinct(ends)
        if self.confidence_tokens:
            weigh(ends, self.keep, self.measure, self.window, self.weight)
        return ends


class _Vote(PrefixVote):
    """The vote of the draws so far; it is decided by agreement or by the Beta posterior."""

    def __init__(self, stop: str, threshold: float, tally: Tally) -> None:
        super().__init__(tally)
        self._stop, self._threshold = stop, threshold

    def take(self, end: Node) -> bool:
        """Count the next draw. Return True if the vote is decided."""
        self._tally.add(end)
        first, second, *_ = (*map(round, self._tally.sums), 0, 0)
        draws = self._tally.draws
        if self._stop == "beta":
            self.decided = ahead(first, second) >= self._threshold
        else:
            self.decided = draws > 1 and draws & (draws - 1) == 0 and first >= self._threshold * draws
        return self.decided

    def least(self) -> int:
        """The least number of further draws that can decide."""
        if self._stop == "adaptive":
            draws = self._tally.draws
            return 2 if draws < 2 else (1 << draws.bit_length()) - draws
        first, second, *_ = (*map(round, self._tally.sums), 0, 0)
        more = 1
        while ahead(first + more, second) < self._threshold:
            more += 1
        return more


def ahead(first: int, second: int) -> float:
    """1 - I_0.5(first + 1, second + 1): the probability that an answer's share of two answers is above one half.

    Args:
        first, second: votes for it and for the other.
    """
    trials = first + second + 1  # of a fair coin: I_x(a, b) is the upper tail of a binomial, for integers
    return sum(math.comb(trials, heads) for heads in range(first + 1)) / 2**trials


def weigh(
    ends: Sequence[Node], keep: float, measure: Measure, window: int, weight: Literal["confidence"] | None
) -> None:
    """Give answers their weights: to the surest complete ones (of all, where none is), and 0 to the others.

    Args:
        ends: distinct answers.
        keep: share of the draws that votes, rounded up.
        measure, window: see trace_confidence.
        weight: of a draw: "confidence", or None for 1.
    """
    rivals = [end for end in ends if end.finish == "stop"] or list(ends)
    confidence = {end: trace_confidence(end, measure, window) for end in rivals}
    left = math.ceil(keep * sum(end.count for end in rivals))
    for end in ends:
        end.weight = 0.0
    for end in sorted(rivals, key=lambda end: -confidence[end]):  # stable: the first of equals stays first
        if left > 0:
            end.weight = end.count * (1.0 if weight is None else confidence[end])
            left -= end.count
