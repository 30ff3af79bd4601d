"""The hidden rows that a forward gives: whose they are, which are kept, and from which tokens are scored."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .waves import Piece


@dataclass
class Targets:
    """Tokens to score.

    Attributes:
        ids: [N] int64.
        parts: whose they are, in order: the piece, and its branch's own tokens [low, high) that are wanted. The first
            token of a path has nothing before it: it has no row, no id here, and no log-probability.
    """

    ids: np.ndarray
    parts: list[tuple[int, int, int]]


class WaveRows:
    """The rows of the pieces that one forward encodes: planned before it, on the host; filled in after it.

    Args:
        pieces: the pieces.
        order: the order in which they are packed.
        spans: id of a branch -> own tokens [low, high) that are to be scored.
        others: how many pieces, the last ones, are none of these branches'.

    Attributes:
        ends: [G] int64 packed positions of the rows that are kept, each the newest of its branch.
        targets: what is scored.
        others: packed positions of the others' rows.
    """

    def __init__(
        self, pieces: Sequence[Piece], order: Sequence[int], spans: Mapping[int, tuple[int, int]], others: int = 0
    ) -> None:
        self.wave = wave = pieces[: len(pieces) - others]
        self._first: dict[int, int] = {}  # piece -> its first row
        offset = 0
        for i in order:
            self._first[i] = offset
            offset += pieces[i].end - pieces[i].begin
        self.others = np.array([self._first[i] for i in range(len(wave), len(pieces))], dtype=np.int64)
        self._grown = [i for i, piece in enumerate(wave) if piece.end > piece.branch.hidden_at]
        ends = [self._first[i] + wave[i].end - wave[i].begin - 1 for i in self._grown]
        self.ends = np.array(ends, dtype=np.int64)
        self.targets = self._wanted(spans)

    def _wanted(self, spans: Mapping[int, tuple[int, int]]) -> Targets:
        ids: list[int] = []
        parts: list[tuple[int, int, int]] = []
        for i, piece in enumerate(self.wave) if spans else ():
            low, high = spans.get(id(piece.branch), (0, 0))
            low, high = max(low, piece.begin), min(high, piece.end)
            if low < high:
                ids += piece.branch.token_ids[low + (piece.branch.start + low == 0) : high]
                parts.append((i, low, high))
        return Targets(np.array(ids, dtype=np.int64), parts)

    def keep_at_forks(self, hidden: torch.Tensor) -> None:
        """Keep the rows, of these [T, D], that forks inside this forward's pieces go on from."""
        for i, piece in enumerate(self.wave):
            rows = piece.branch.fork_rows
            for own, known in rows.items():
                if known is None and piece.begin < own <= piece.end:
                    rows[own] = hidden[self._first[i] + own - piece.begin - 1].clone()

    def scored(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[N, D] the row before each target, or None without targets; before `keep`, which overwrites rows that new
        tokens follow.

        Raises:
            RuntimeError: the row before a wanted token is not known.
        """
        rows: list[torch.Tensor] = []
        for i, low, high in self.targets.parts:
            piece, branch = self.wave[i], self.wave[i].branch
            at = self._first[i] - piece.begin  # own token t has its row at `at + t`
            if low == 0:
                before = branch.before()
            elif branch.hidden_at == low:
                before = branch.hidden  # kept, so that evictions change no log-prob
            else:
                before = hidden[at + low - 1] if low > piece.begin else None
            if before is None and branch.start + low:
                raise RuntimeError(f"the hidden row before token {low} of {branch!r} is lost")
            if before is not None:
                rows.append(before[None])
            rows.append(hidden[at + low : at + high - 1])
        return torch.cat(rows) if rows else None

    def hand_out(self, logprobs: np.ndarray, by_branch: Mapping[int, list[np.ndarray]]) -> None:
        """Append the targets' log-probabilities, [N], to the lists of their branches; NaN where there is none."""
        position = 0
        for i, low, high in self.targets.parts:
            branch = self.wave[i].branch
            blind = branch.start + low == 0
            values = logprobs[position : position + high - low - blind]
            position += high - low - blind
            by_branch[id(branch)].append(np.concatenate(([np.nan], values)).astype(logprobs.dtype) if blind else values)

    def keep(self, hidden: torch.Tensor, ends: torch.Tensor, model: Hashable) -> None:
        """Keep each branch's newest row (never an older one again) and count the tokens for the model's id.

        Args:
            hidden: [T, D] last hidden rows.
            ends: `self.ends` on their device.
            model: id of the model.
        """
        for row, i in zip(hidden.index_select(0, ends), self._grown, strict=True):
            self.wave[i].branch.hidden, self.wave[i].branch.hidden_at = row, self.wave[i].end
        for piece in self.wave:
            branch = piece.branch
            if branch.meter is not None:
                again = max(0, min(piece.end, branch.seen) - piece.begin)
                branch.meter.add("reencoded", model, again)
                branch.meter.add("encoded", model, piece.end - piece.begin - again)
            branch.seen = max(branch.seen, piece.end)
