"""TextScorer: scorers whose `score` takes texts and gives a number a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from ..base import BATCH_TOKENS, ScorerBase
from ..responses import Steps
from .step_scores import StepScores, score_texts


class TextScorer(ScorerBase):
    """Base of scorers that read complete responses as texts, in steps."""

    one_piece: ClassVar[bool] = True  # where whole answers are judged, each is read as one text, not in steps

    def check_texts(self) -> None:
        """Raise ValueError where this scorer cannot score complete responses; all can here."""

    def score(  # type: ignore[override]  # a number a step, and text: ids would mean nothing to it
        self,
        prompts: Iterable[Any],
        responses: Iterable[Any],
        *,
        steps: Steps = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[StepScores]:
        """Scores of complete responses. No end of sequence is scored behind them.

        Args:
            prompts: B prompts: strings, lists of chat messages, or Prompts with either.
            responses: B responses: strings, or where steps are scored lists of strings, a step each.
            steps: a StepRule that cuts strings into steps; None for StepRule().
            batch_tokens: tokens handled at once, about; bounds the memory, changes no result.

        Returns:
            B StepScores, in order. Where answers are judged, the last step has the score. Nothing is kept: all KV is
            freed.

        Raises:
            ValueError: this scorer cannot (an Ensemble whose pairs have different tokenizers, or that weighs siblings
                of a search); or as ScorerBase.score, of text.
            TypeError: as ScorerBase.score, of text.
        """
        self.check_texts()
        whole = self.whole and self.one_piece
        return score_texts(self, prompts, responses, steps=steps, batch_tokens=batch_tokens, whole=whole)
