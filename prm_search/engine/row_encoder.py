"""RowEncoder: an Encoder whose rows grow by a token each, together, as a decode loop asks for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .encoder import Encoder
from .growth import Growth
from .hidden_rows import WaveRows
from .kv_tree import Branch
from .pending import Pending, Undo
from .waves import Piece, missing, next_batch


class RowEncoder(Encoder):
    """An Encoder with rounds: a token for each row of a `Growth`, and nodes that begin beside them."""

    def begin_round(self, growth: Growth, tokens: np.ndarray, nodes: Sequence[Branch]) -> Pending[torch.Tensor]:
        """A token for each row of a growth, and whatever has no KV on the paths of nodes, in one forward if it fits.

        Args:
            growth: of this model's tree.
            tokens: [R] int64, the newest of each row.
            nodes: B further branches.

        Returns:
            logits [R + B, V] after the rows and the nodes; see extend. The caller finds numbers that are none, and then
            calls `Pending.undo` and raises `not_numbers`.

        Raises:
            ValueError: as extend.
        """
        rows, none = len(growth), [()] * len(nodes)
        self._validate(nodes, none)
        with self._running():
            if rows:
                self._check_ids(tokens)
                reach = min(self.tree.capacity, self.context or self.tree.capacity)
                if growth.reach() > reach or rows > self.forward_tokens or not growth.revive():
                    return self._round_of_branches(growth, tokens, nodes)
            elif nodes:
                return self.begin_extend(nodes, none, want="logits")  # type: ignore[return-value]
            undo = Undo(self.tree)

            def undone() -> None:
                with self.tree.lock:
                    growth.take_back()
                undo.roll_back()

            begun = False
            try:
                wave = self._beside(rows, [node for node in nodes if missing(node)])
                if wave is None:
                    self._encode(nodes, None, undo)
                    wave = []
                if not (growth.live and self.tree.make_room(rows + sum(p.end - p.begin for p in wave))):
                    growth.store()
                    return self._round_of_branches(growth, tokens, nodes)
                for node in nodes:
                    self.tree.touch(node)
                for piece in wave:
                    undo.note(piece.branch)
                slots, begun = growth.begin(tokens), True
                final = self._forward_rows(growth, tokens, slots, wave)
                if nodes:
                    final = torch.cat([final, torch.stack([node.end_row() for node in nodes])])
                logits = self.head.logits(final)
                return self._pending(None, lambda _: self._handed_over(logits), undone)
            except BaseException:
                if begun:
                    undone()
                else:
                    undo.roll_back()
                raise

    def begin_ahead(self, growth: Growth, tokens: torch.Tensor) -> Pending[torch.Tensor] | None:
        """A token for each row, before the host knows which: `Growth.name` tells it. With the tree's lock held.

        Args:
            growth: of this model's tree.
            tokens: [R] int64 on any device: what has just been drawn.

        Returns:
            logits [R, V], as begin_round; None where the rows have no room to grow together.
        """
        reach = min(self.tree.capacity, self.context or self.tree.capacity)
        with self._running():
            rows = len(growth)
            together = rows and growth.live and growth.reach() <= reach and rows <= self.forward_tokens
            if not (together and self.tree.make_room(rows)):
                return None
            slots = growth.begin(None)
            try:
                logits = self.head.logits(self._forward_rows(growth, tokens.to(self.device), slots, []))
            except BaseException:
                growth.take_back()
                raise

            def undone() -> None:
                with self.tree.lock:
                    growth.take_back()

            return self._pending(None, lambda _: self._handed_over(logits), undone)

    def waste(self, growth: Growth, places: Sequence[int]) -> None:
        """Take back from rows what begin_ahead encoded: they had ended. Counted as wasted, not as encoded."""
        with self.tree.lock:
            if growth.live:
                growth.waste(places)
                self.wasted += len(places)
                for place in places:
                    meter = growth.tips[place].meter
                    if meter is not None:
                        meter.add("encoded", self.id, -1)

    def _beside(self, rows: int, nodes: Sequence[Branch]) -> list[Piece] | None:
        """The pieces that nodes lack, if they fit a forward beside so many rows without an eviction; else None."""
        if not nodes:
            return []
        batch = next_batch(nodes, self.tree.capacity, self.tree.free, self.forward_tokens)
        new = rows + sum(piece.end - piece.begin for piece in batch.pieces)
        fits = batch.branches == len(nodes) and new <= min(self.tree.free, self.forward_tokens)
        return batch.pieces if fits else None

    def _forward_rows(
        self, growth: Growth, tokens: np.ndarray | torch.Tensor, slots: np.ndarray, wave: list[Piece]
    ) -> torch.Tensor:
        """The hidden rows [R, D] of a growth's newest tokens; with the pieces of a wave in the same forward."""
        token_forward = None if wave else self.runner.plan_rows(growth, tokens, slots)
        if token_forward is not None:
            hidden = token_forward.run()
        else:
            taken = [self.tree.take(piece.branch, piece.end - piece.begin) for piece in wave]
            pieces = [*wave, *growth.pieces()]
            forward = self.runner.plan(pieces, [*taken, *np.split(slots, len(slots))])
            rows = WaveRows(pieces, forward.order, {}, others=len(slots))
            ids = tokens if isinstance(tokens, torch.Tensor) else None
            hidden, (ends, places) = forward.run([rows.ends, rows.others], ids)
            rows.keep_at_forks(hidden)
            rows.keep(hidden, ends, self.id)
            hidden = hidden.index_select(0, places)
        self.forwards += 1
        growth.grown(hidden)
        for meter, count in growth.meters():
            meter.add("encoded", self.id, count)
        return hidden

    def _round_of_branches(self, growth: Growth, tokens: np.ndarray, nodes: Sequence[Branch]) -> Pending[torch.Tensor]:
        """A round in which rows grow as any branches do: what cannot be resident at once."""
        growth.store()
        branches = [*growth.tips, *nodes]
        ids = [[token] for token in tokens.tolist()] + [[] for _ in nodes]
        pending = self.begin_extend(branches, ids, want="logits")
        growth.passed(tokens)

        def undone() -> None:
            with self.tree.lock:
                growth.take_back()
            pending.undo()

        return self._pending(None, lambda _: pending.result(), undone)  # type: ignore[arg-type,return-value]
