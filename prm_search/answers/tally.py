"""Votes that are counted while answers are drawn."""

from __future__ import annotations

from ..tree import Node
from .equivalence import Form, alike, form
from .extract import Answer
from .select import answer_of


class Tally:
    """The votes of the responses drawn so far.

    Answers are one where their spelling or their number says so. math-verify, which `select` asks too, may take
    seconds, so it is left to the vote at the end. A response that a limit cut, or without an answer, does not vote.

    Args:
        answer: finds the final answer in a text; None for votes on whole texts.

    Attributes:
        draws: responses, those that do not vote too.
    """

    def __init__(self, answer: Answer | None) -> None:
        self.draws = 0
        self._answer = answer
        self._forms: dict[Form, int] = {}
        self._sums: list[float] = []

    def add(self, node: Node, weight: float = 1.0) -> None:
        """Count a response.

        Args:
            node: its end.
            weight: of its vote.
        """
        self.draws += 1
        text = answer_of(self._answer, node) if node.finish == "stop" else None
        if text is None:
            return
        key = Form(text, None) if self._answer is None else form(text)
        place = self._forms.get(key)
        if place is None:
            place = next((at for other, at in self._forms.items() if alike(other, key)), None)
            if place is None:
                place = len(self._sums)
                self._sums.append(0.0)
            self._forms[key] = place
        self._sums[place] += weight

    @property
    def sums(self) -> list[float]:
        """Each answer's weight of votes, the largest first."""
        return sorted(self._sums, reverse=True)
