"""Rows of a growth and what each has of its own: its keys and values side by side, as attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ..growth import Growth

STEP = 64  # tokens by which the room for a row's own grows


class Room:
    """Bytes that the mirrors of a growth may still take.

    Args:
        left: all of them.
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> bool:
        """Take so many bytes, or none where they are not left. Returns whether they were."""
        taken = size <= self.left
        self.left -= size * taken
        return taken


class Mirror:
    """The keys and values of one layer.

    Attributes:
        keys, values: [B, kv_heads, W, dim]; what is behind a row's own is finite.
        have: [B] tokens of each row that stand here.
        heirs: newer groups that have taken over what they need.
    """

    __slots__ = ("have", "heirs", "keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, have: np.ndarray) -> None:
        self.keys, self.values, self.have, self.heirs = keys, values, have, 0

    def take_over(self, other: Mirror, new: np.ndarray, old: np.ndarray) -> None:
        """Copy another's lines `old` to the lines `new`."""
        width = int(other.have[old].max())
        to, of = torch.from_numpy(new), torch.from_numpy(old)
        self.keys[:, :, :width].index_copy_(0, to, other.keys[:, :, :width].index_select(0, of))
        self.values[:, :, :width].index_copy_(0, to, other.values[:, :, :width].index_select(0, of))
        self.have[new] = other.have[old]

    def bytes(self) -> int:
        """Return what it takes."""
        return self.keys.nbytes + self.values.nbytes


class OwnRows:
    """Rows of similar length, attended to together over what is their own.

    Their keys and values are mirrored: gathered from the slots once, and from then on a token at a time. A mirror is a
    cache of the pool, and made where there is room for it.

    Args:
        places: which rows [B] of the growth, rising.
        growth: live.
        offset: [R] tokens of each path that are not its row's own here.
        room: for mirrors.

    Attributes:
        places: as given, on torch's side; None for all rows in order.
        own: [B] tokens that each row has of its own.
        longest: the most of them.
    """

    def __init__(self, places: np.ndarray, growth: Growth, offset: np.ndarray, room: Room) -> None:
        self.places = None if len(places) == len(growth) else torch.from_numpy(places)
        self._at, self._first, self._growth, self._room = places, offset[places], growth, room
        self._paths = [growth.rows[place] for place in places]
        self._epochs = [path.epoch for path in self._paths]
        self._lines = np.arange(len(places))
        self._mirrors: dict[int, Mirror] = {}
        self._before: list[tuple[OwnRows, np.ndarray, np.ndarray]] = []
        self._heirs = 0
        self.grow()

    def inherit(self, groups: Sequence[OwnRows]) -> None:
        """Take over, as layers are read, what older groups have mirrored of the same rows."""
        here = {path: line for line, path in enumerate(self._paths)}
        for group in groups:
            lines = [
                (here[path], line)
                for line, path in enumerate(group._paths)
                if path in here and path.epoch == group._epochs[line] and group._first[line] == self._first[here[path]]
            ]
            if lines:
                new, old = np.array(lines).T.copy()
                self._before.append((group, new, old))
                group._heirs += 1

    def forget_elders(self) -> None:
        """Let go of the groups that were inherited from."""
        self._before = []

    def grow(self) -> None:
        """Take the newest token of each row's path as its own."""
        self.own = self._growth.length[self._at] - self._first
        self.longest = int(self.own.max())
        self._lacking: tuple[np.ndarray, tuple[torch.Tensor, ...]] | None = None
        self._slots: torch.Tensor | None = None
        self._bias: dict[torch.dtype, torch.Tensor | None] = {}

    def read(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, kv_heads, S, dim] keys and values of a layer, padded to the longest.

        Args:
            layer: its index.
            keys, values: [slots, kv_heads, dim] of its pools, the newest tokens included.
        """
        mirror = self._mirrors.get(layer)
        if mirror is None or mirror.keys.shape[2] < self.longest:
            mirror = self._made(layer, mirror, keys, values)
            if mirror is None:
                return self._gathered(keys), self._gathered(values)
        if mirror.have is not self.own:
            slots, lines, at = self._lack(mirror.have)
            for pool, copy in ((keys, mirror.keys), (values, mirror.values)):
                copy.transpose(1, 2).index_put_((lines, at), pool.index_select(0, slots))
            mirror.have = self.own
        return mirror.keys[:, :, : self.longest], mirror.values[:, :, : self.longest]

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, 1, S] additive mask of what is behind a row's own; None where nothing is."""
        if dtype not in self._bias:
            mask = None
            if int(self.own.min()) < self.longest:
                behind = torch.from_numpy(np.arange(self.longest) >= self.own[:, None])
                mask = torch.zeros(behind.shape, dtype=dtype).masked_fill_(behind, -torch.inf)[:, None, None]
            self._bias[dtype] = mask
        return self._bias[dtype]

    def _lack(self, have: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The tokens that a mirror lacks: their slots, and the line and the place of each in it.

        The newest is one of them at any rate: a round that was taken back may have left another in its place.
        """
        if self._lacking is None or self._lacking[0] is not have:
            low = np.minimum(have, self.own - 1)
            count = self.own - low
            lines, at = self._lines, low
            if int(count.max()) > 1:
                lines = np.repeat(self._lines, count)
                at = np.arange(len(lines)) + np.repeat(low - np.cumsum(count) + count, count)
            slots = self._growth.paths[self._at[lines], self._first[lines] + at]
            self._lacking = have, (torch.from_numpy(slots), torch.from_numpy(lines), torch.from_numpy(at))
        return self._lacking[1]

    def _made(self, layer: int, narrow: Mirror | None, keys: torch.Tensor, values: torch.Tensor) -> Mirror | None:
        """A mirror that is wide enough, with what is known already; None where there is no room for it."""
        if narrow is None:
            known = [(group, group._mirrors.get(layer), new, old) for group, new, old in self._before]
        else:
            known = [(self, self._mirrors.pop(layer), self._lines, self._lines)]
            self._room.left += narrow.bytes()
        parts = [(group, mirror, new, old) for group, mirror, new, old in known if mirror is not None]
        rows, width = len(self._lines), STEP * (1 + self.longest // STEP)
        numbers = rows * width * sum(pool[0].numel() for pool in (keys, values))
        made = None
        if self._room.take(numbers * keys.element_size()):
            fresh = [pool.new_zeros((rows, pool.shape[1], width, pool.shape[2])) for pool in (keys, values)]
            made = self._mirrors[layer] = Mirror(fresh[0], fresh[1], np.zeros(rows, np.int64))
        for group, mirror, new, old in parts:
            if made is not None:
                made.take_over(mirror, new, old)
            mirror.heirs += 1
            if group is not self and mirror.heirs == group._heirs:
                del group._mirrors[layer]
        return made

    def _gathered(self, pool: torch.Tensor) -> torch.Tensor:
        """[B, kv_heads, S, dim] of keys or values, from their slots."""
        if self._slots is None:
            step = np.minimum(np.arange(self.longest), self.own[:, None] - 1)  # masked, but must hold finite numbers
            self._slots = torch.from_numpy(self._growth.paths[self._at[:, None], self._first[:, None] + step])
        slots = self._slots
        return pool.index_select(0, slots.view(-1)).view(*slots.shape, *pool.shape[1:]).transpose(1, 2)
