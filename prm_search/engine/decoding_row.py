"""DecodingRow: a child that the Decoder draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..drawing import Draw
from .kv_tree import Branch


@dataclass(eq=False)
class DecodingRow(Draw):
    """One child being drawn. While it is decoded its newest tokens may stand in the RowTable only.

    Attributes:
        branches: for each model, the branches of its steps; once it is decoded no more.
        scored: for each step and model, the drawn tokens' log-probs.
        token: drawn, not encoded yet; None before the first.
    """

    branches: list[list[Branch]] = field(default_factory=list)
    scored: list[list[list[float]]] = field(default_factory=list)
    token: int | None = None
    _catch_up: Callable[[], None] | None = None

    @property
    def position(self) -> int:
        """See Draw.position."""
        self.catch_up()
        return super().position

    def ids(self) -> list[int]:
        """See Draw.ids."""
        self.catch_up()
        return super().ids()

    def follow(self, catch_up: Callable[[], None] | None) -> None:
        """Be told how this row is brought up to date; None once it is decoded no more."""
        self._catch_up = catch_up

    def catch_up(self) -> None:
        """Read what has been drawn for this row, should it stand elsewhere yet."""
        if self._catch_up is not None:
            self._catch_up()

    def read(self, token: int, values: Sequence[float]) -> None:
        """Record a token with its log-prob under each model and its confidence; `settle` has to follow."""
        if self.fresh:
            self.scored.append([[] for _ in values[:-1]])
        self.record(token, values[0], values[-1])
        for known, value in zip(self.scored[-1], values, strict=False):
            known.append(value)
        self.token = token

    def read_many(self, tokens: Sequence[int], values: Sequence[Sequence[float]]) -> None:
        """`read` for tokens that end nothing; the values of each model, and the confidences."""
        if not tokens:
            return
        if self.fresh:
            self.scored.append([[] for _ in values[:-1]])
        self.record_many(tokens, values[0], values[-1])
        for known, column in zip(self.scored[-1], values, strict=False):
            known.extend(column)
        self.token = tokens[-1]
