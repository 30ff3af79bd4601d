"""Scores: the rewards of one complete response, token by token and step by step. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Scores:
    """Rewards of a response under a pair, in beta * nats.

    Attributes:
        token_ids: the T tokens that were scored, an end of sequence included where there is one.
        token_rewards: [T] fp32, beta * (log pi_phi(y_t) - log pi_ref(y_t)).
        step_ends: [S] int64, response tokens up to each step's end, rising; the last is T.
        pieces: T strings, the text that each token adds; joined they are the response's text. A character that is
            split over tokens stands with its last one. Special tokens stand as they are written ("</s>").

    Raises:
        ValueError: lengths disagree, or step_ends does not rise to T.
    """

    token_ids: tuple[int, ...]
    token_rewards: np.ndarray
    step_ends: np.ndarray
    pieces: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_rewards", np.asarray(self.token_rewards, np.float32))
        object.__setattr__(self, "step_ends", np.asarray(self.step_ends, np.int64))
        tokens = len(self.token_ids)
        if self.token_rewards.shape != (tokens,) or len(self.pieces) != tokens:
            raise ValueError(f"{tokens} tokens with {self.token_rewards.shape} rewards and {len(self.pieces)} pieces")
        ends = self.step_ends
        if not tokens or ends.ndim != 1 or not len(ends) or ends[-1] != tokens or (np.diff(ends, prepend=0) <= 0).any():
            raise ValueError(f"step ends {ends.tolist()} must rise from above 0 to the {tokens} tokens of the response")

    @cached_property
    def q(self) -> np.ndarray:
        """[T] fp32: the value of every prefix, q_t = sum of token_rewards up to t (arXiv 2412.01981, eq. 2)."""
        return self._sums.astype(np.float32)

    @cached_property
    def step_rewards(self) -> np.ndarray:
        """[S] fp32: q at each step's end minus q at its start (arXiv 2412.01981, eq. 3)."""
        return np.diff(self._sums[self.step_ends - 1], prepend=0.0).astype(np.float32)

    @property
    def reward(self) -> float:
        """The outcome reward: the sum of all token rewards."""
        return float(self._sums[-1])

    @property
    def text(self) -> str:
        """The response, special tokens included."""
        return "".join(self.pieces)

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.cumsum(self.token_rewards, dtype=np.float64)

    def __repr__(self) -> str:
        return f"<Scores tokens={len(self.token_ids)} steps={len(self.step_ends)} reward={self.reward:.4g}>"
