"""The hidden rows that a forward gives: whose they are, which are kept, and from which tokens are scored."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .plan import Piece


@dataclass
class Targets:
    """Tokens to score.

    Attributes:
        hidden: [N, D] the row before each.
        ids: [N] int64.
        parts: whose they are, in order: id of the branch, tokens, and whether its first has nothing before it (and so
            no row here, and no log-probability).
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    parts: list[tuple[int, int, bool]]

    def hand_out(self, logprobs: np.ndarray, found: Mapping[int, list[np.ndarray]]) -> None:
        """Append the tokens' log-probabilities, [N], to the lists of their branches; NaN where there is none."""
        position = 0
        for key, count, blind in self.parts:
            values = logprobs[position : position + count - blind]
            position += count - blind
            found[key].append(np.concatenate(([np.nan], values)).astype(logprobs.dtype) if blind else values)


class WaveRows:
    """The rows of the pieces that one forward encoded.

    Args:
        wave: the pieces.
        order: the order in which they were packed.
        hidden: [T, D] last hidden rows, in packed order.
    """

    def __init__(self, wave: Sequence[Piece], order: Sequence[int], hidden: torch.Tensor) -> None:
        self.wave = wave
        self.hidden = hidden
        self._first: dict[int, int] = {}  # piece -> its first row
        offset = 0
        for i in order:
            self._first[i] = offset
            offset += wave[i].end - wave[i].begin

    def bound(self) -> None:
        """Fill in the boundary rows of branches whose parents end in this very forward."""
        rows = {id(piece.branch): (self._first[i] - piece.begin, piece) for i, piece in enumerate(self.wave)}
        for piece in self.wave:
            branch = piece.branch
            if piece.begin or branch.parent is None or branch.before() is not None:
                continue
            at = branch.start - branch.parent.start  # own tokens of the parent before the fork
            offset, above = rows.get(id(branch.parent), (0, None))
            if above is not None and above.begin < at <= above.end:
                branch.boundary = self.hidden[offset + at - 1].clone()

    def targets(self, spans: Mapping[int, tuple[int, int]]) -> Targets | None:
        """What to score of these pieces; before `keep`, which overwrites the rows that new tokens follow.

        Args:
            spans: id of a branch -> own tokens [low, high) that are wanted.

        Raises:
            RuntimeError: the row before a wanted token is not known.
        """
        rows: list[torch.Tensor] = []
        ids: list[int] = []
        parts: list[tuple[int, int, bool]] = []
        for i, piece in enumerate(self.wave):
            low, high = spans.get(id(piece.branch), (0, 0))
            low, high = max(low, piece.begin), min(high, piece.end)
            if low >= high:
                continue
            branch, at = piece.branch, self._first[i] - piece.begin  # own token t has its row at `at + t`
            if low == 0:
                before = branch.before()
            elif branch.hidden_at == low:
                before = branch.hidden  # kept, so that evictions change no log-prob
            else:
                before = self.hidden[at + low - 1] if low > piece.begin else None
            if before is None and branch.start + low:
                raise RuntimeError(f"the hidden row before token {low} of {branch!r} is lost")
            if before is not None:
                rows.append(before[None])
            rows.append(self.hidden[at + low : at + high - 1])
            ids += branch.token_ids[low + (before is None) : high]
            parts.append((id(branch), high - low, before is None))
        if not parts:
            return None
        return Targets(torch.cat(rows), torch.tensor(ids, dtype=torch.long, device=self.hidden.device), parts)

    def keep(self, model: Hashable) -> None:
        """Keep each branch's newest row (never an older one again) and count the tokens for the model's id."""
        grown = [i for i, piece in enumerate(self.wave) if piece.end > piece.branch.hidden_at]
        ends = [self._first[i] + self.wave[i].end - self.wave[i].begin - 1 for i in grown]
        kept = self.hidden[torch.tensor(ends, dtype=torch.long, device=self.hidden.device)]
        for row, i in zip(kept, grown, strict=True):
            self.wave[i].branch.hidden, self.wave[i].branch.hidden_at = row, self.wave[i].end
        for piece in self.wave:
            branch = piece.branch
            if branch.meter is not None:
                again = max(0, min(piece.end, branch.seen) - piece.begin)
                branch.meter.add("reencoded", model, again)
                branch.meter.add("encoded", model, piece.end - piece.begin - again)
            branch.seen = max(branch.seen, piece.end)
