"""DeepConf: a vote by confidence, whose weak answers are stopped while they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..answers import Select
from ..answers.tally import Tally
from ..checks import number
from ..confidence import TOP_TOKENS, WINDOW, trace_confidence
from ..sampling import Floor
from ..tree import Node
from .base import Expand, Run, at_least
from .prefix_vote import PrefixVote


@dataclass(frozen=True)
class DeepConf:
    """Draw a few answers whole, and of the rest only as much as stays as sure as the best of them.

    Source: Y. Fu et al., "Deep Think with Confidence", arXiv 2508.15260, section 3 (online). An answer's confidence is
    that of the group of `window` tokens in a row of which the policy was least sure. The bar is the 1 - keep quantile
    of the warm-up answers'. A later answer is stopped (finish "weak") as soon as a group lies below the bar. Nothing
    stops an answer that is shorter than a group. Answers that reach the bar vote with their confidence, and drawing
    ends once one of them has the share `consensus` of the votes. No scorer is needed.

    The quantile and the consensus are the paper's; the released code takes the `keep` quantile and has no consensus.

    Args:
        warmup: answers that are drawn whole.
        budget: answers in all, at most.
        keep: share of the warm-up answers that reach the bar, in (0, 1]: 0.1 for DeepConf-low, 0.9 for DeepConf-high.
        window: tokens of a group.
        top: most probable tokens that a token's confidence is the mean over.
        consensus: share of the votes that ends the drawing, in (0, 1]; None draws the whole budget.
        wave: answers drawn at once after the warm-up; None for as many as in it.

    Raises:
        ValueError: a number is out of range, or the budget is below the warm-up.
        TypeError: keep or consensus is not a number.
    """

    warmup: int = 16
    budget: int = 256
    keep: float = 0.1
    window: int = WINDOW
    top: int = TOP_TOKENS
    consensus: float | None = 0.95
    wave: int | None = None

    select: ClassVar[Select] = "weighted"

    def __post_init__(self) -> None:
        for name in ("warmup", "budget", "window", "top"):
            at_least(name, getattr(self, name))
        if self.wave is not None:
            at_least("wave", self.wave)
        if self.budget < self.warmup:
            raise ValueError(f"budget={self.budget}: at least the {self.warmup} answers of the warm-up are needed")
        number("keep", self.keep, "a share in (0, 1]", lambda share: 0 < share <= 1)
        if self.consensus is not None:
            number("consensus", self.consensus, "a share in (0, 1] or None", lambda share: 0 < share <= 1)

    @property
    def confidence_tokens(self) -> int:
        """See Sampling."""
        return self.top

    def run(self, root: Node) -> Run:
        ends = yield Expand([root], self.warmup, until="end", merge=False, alive=[root])
        if not ends:
            return []
        bar = float(np.quantile([trace_confidence(end, "group", self.window) for end in ends], 1 - self.keep))
        vote = _Vote(Tally(root.tree.answer), bar, self)
        vote.cut(ends)
        while len(ends) < self.budget and not vote.decided:
            more = min(self.wave or self.warmup, self.budget - len(ends))
            drawn = yield Expand(
                [root], more, until="end", merge=False, alive=[root], floor=Floor(self.window, bar), enough=vote.take
            )
            if not drawn:
                break  # the token budget ended
            ends = vote.cut([*ends, *drawn])
        voters = {end for end in ends if vote.admits(end)} or set(ends)
        for end in ends:
            end.weight = trace_confidence(end, "group", self.window) if end in voters else 0.0
        return ends


class _Vote(PrefixVote):
    """The vote by confidence; it is decided when one answer has its share."""

    def __init__(self, tally: Tally, bar: float, config: DeepConf) -> None:
        super().__init__(tally)
        self._bar, self._config = bar, config

    def admits(self, end: Node) -> bool:
        """Return True if an answer reaches the bar."""
        return end.finish != "weak" and trace_confidence(end, "group", self._config.window) >= self._bar

    def take(self, end: Node) -> bool:
        """Count the next answer. Return True if that decides the vote."""
        self._tally.add(end, trace_confidence(end, "group", self._config.window) if self.admits(end) else 0.0)
        sums, consensus = self._tally.sums, self._config.consensus
        whole = self._tally.draws >= self._config.warmup
        self.decided = whole and consensus is not None and sum(sums) > 0 and sums[0] >= consensus * sum(sums)
        return self.decided
