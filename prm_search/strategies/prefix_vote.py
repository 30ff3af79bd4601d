"""PrefixVote: a vote that stops at the draw which decides it, whatever was drawn beside. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..answers.tally import Tally
from ..tree import Node


class PrefixVote(ABC):
    """The vote of the first draws, in their order. So what it decides does not depend on which draw ended first.

    Attributes:
        decided: no further draw is needed.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.decided = False

    @abstractmethod
    def take(self, end: Node) -> bool:
        """Count the next draw. Return True if that decides the vote."""

    def cut(self, ends: Sequence[Node]) -> list[Node]:
        """The draws up to the one that decided; those that came uncounted are counted."""
        for end in ends[self._tally.draws :]:
            if self.decided:
                break
            self.take(end)
        return list(ends[: self._tally.draws])
