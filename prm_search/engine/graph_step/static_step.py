"""One new token for each of a few branches, from tensors that never move: what a CUDA graph can replay.

Between two steps the host takes slots, evicts and plans; then one copy brings the step's integers to the device: ids,
positions, slots, lengths, families, and the lines of the slot table that cannot be appended to. Everything after that
copy reads static tensors only, and is the same launches for every step of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...triton_kernels import SharedPrefix, tiles, tree_attention
from ...triton_kernels.launch import Backend
from ..attention.hook import Packed
from ..attention.layout import Operands
from ..module_run import ModuleRun
from ..waves import Piece
from .slot_table import SlotTable, families

ROWS = 256  # branches of a step at most
LEAST_PATH = 512  # slots of the narrowest table
LONGEST_PATH = 1 << 17  # slots of the widest: above, the table itself would be large

_ALSO = ("ends", "targets")  # what else a forward needs on the device
_FIELDS = ("ids", "positions", "slots", "lengths", "shared", "lines", "families", *_ALSO)
_SPAN = ROWS + 8  # integers of a field


@dataclass(frozen=True)
class Shape:
    """Steps of one shape launch the same kernels on the same tensors.

    Attributes:
        rows: lines that take part, a power of two; those without a branch are padding.
        path: slots of the longest path at most, a power of two.
        shares_prefixes: whether prefixes that neighbours share are told to the attention.
    """

    rows: int
    path: int
    shares_prefixes: bool

    @classmethod
    def of(cls, rows: int, path: int, shares_prefixes: bool) -> Shape:
        """The smallest shape with room for so many branches and slots."""
        return cls(tiles.power_of_two(rows), max(LEAST_PATH, tiles.power_of_two(path)), shares_prefixes)


class StaticStep:
    """The static tensors of one LanguageModel, and the step over them.

    Padding lines have length 0 and slot -1: they attend to nothing, and nothing of theirs is written or read.

    Args:
        run: of the module.

    Attributes:
        lines: which branch stands where.
        copied: integers brought to the device so far.
    """

    def __init__(self, run: ModuleRun) -> None:
        self._run = run
        self.lines = SlotTable(ROWS)
        self.copied = 0
        self.reset()

    def serves(self, wave: Sequence[Piece]) -> bool:
        """Return True if these pieces are a token step: one each, of paths that the table has room for, and every layer
        has its pool already."""
        return (
            len(wave) <= ROWS
            and all(piece.end - piece.begin == 1 for piece in wave)
            and bool(self._run.pool.layers)
            and max(piece.branch.start + piece.end for piece in wave) <= LONGEST_PATH
        )

    def reset(self) -> None:
        """Give the static tensors up: they are made anew, elsewhere, when they are needed."""
        self._width = 0
        self._pools: list[int] = []
        self._inbox = self._table = self._starts = torch.empty(0, dtype=torch.int32)
        self._out: torch.Tensor | None = None  # [ROWS, D] last hidden rows, by line
        self.lines.forget()

    def fits(self, path: int) -> bool:
        """Return True if the static tensors stand over the pools in use, with room for paths of so many slots."""
        return path <= self._width and self._addresses() == self._pools

    def make(self, path: int) -> None:
        """Make the static tensors, with room for paths of so many slots. Whoever holds their addresses is done."""
        device = self._run.device
        self.reset()
        self._width, self._pools = path, self._addresses()
        whole = len(_FIELDS) * _SPAN + ROWS * (1 + path)
        self._inbox = torch.zeros(whole, dtype=torch.int32, device=device)
        self._table = torch.zeros((ROWS, path), dtype=torch.int32, device=device)
        self._starts = torch.arange(ROWS + 1, dtype=torch.int32, device=device)

    def _addresses(self) -> list[int]:
        return [pool.data_ptr() for pair in self._run.pool.layers.values() for pool in pair]

    def load(self, wave: Sequence[Piece], slots: Sequence[np.ndarray], also: Sequence[np.ndarray]) -> Shape:
        """Bring a step's integers to the device, in one copy that is not waited for."""
        branches = [piece.branch for piece in wave]
        lengths = np.array([branch.start + branch.encoded for branch in branches], np.int64)
        longest = max(branch.start for branch in branches)
        shape = Shape.of(len(wave), int(lengths.max()), longest >= tiles.PREFIX_LEAST)
        lines, dirty = self.lines.assign(branches, shape.rows, shares_prefixes=shape.shares_prefixes)
        kin = families(branches, lines, shape.rows // 2) if shape.shares_prefixes else None
        if kin is None or kin[1].max() < tiles.PREFIX_LEAST:
            kin, shape = None, Shape(shape.rows, shape.path, False)

        begin = len(_FIELDS) * _SPAN
        size = begin + len(dirty) * (1 + shape.path)
        host = torch.zeros(size, dtype=torch.int32, pin_memory=self._inbox.is_cuda)
        flat = host.numpy()
        field = dict(zip(_FIELDS, flat[:begin].reshape(len(_FIELDS), _SPAN), strict=True))
        field["slots"][:] = -1
        field["ids"][lines] = [piece.ids()[0] for piece in wave]
        field["positions"][lines] = lengths - 1
        field["slots"][lines] = np.concatenate(slots)
        field["lengths"][lines] = lengths
        field["lines"][: len(wave)] = lines
        if kin is not None:
            first, shared = kin
            field["families"][:] = shape.rows  # families that there are not: empty
            field["families"][: len(first)] = first
            field["shared"][lines] = shared
        for name, array in zip(_ALSO, also, strict=True):
            field[name][: len(array)] = array
        flat[begin : begin + len(dirty)] = lines[dirty]
        rows = flat[begin + len(dirty) :].reshape(len(dirty), shape.path)
        for row, i in zip(rows, dirty, strict=True):
            row[: lengths[i]] = branches[i].path_slots()
        self._inbox[:size].copy_(host, non_blocking=True)
        self.copied += size
        if dirty:
            index, fresh = self._inbox[begin:size].split([len(dirty), len(dirty) * shape.path])
            self._table[:, : shape.path].index_copy_(0, index.long(), fresh.view(len(dirty), shape.path))
        return shape

    def field(self, name: str, count: int) -> torch.Tensor:
        """The first `count` integers of a field of the newest step, [count] int32 on the device."""
        at = _FIELDS.index(name) * _SPAN
        return self._inbox[at : at + count]

    def compute(self, shape: Shape) -> None:
        """The device's part: append to the table, run the module, leave the last hidden rows for `result`."""
        rows = shape.rows
        slots, lengths = self.field("slots", rows), self.field("lengths", rows)
        table = self._table[:rows, : shape.path]
        table.scatter_(1, (lengths - 1).clamp(min=0).long()[:, None], slots[:, None])
        prefix = None
        if shape.shares_prefixes:
            first, shared = self.field("families", rows // 2 + 1), self.field("shared", rows)
            prefix = SharedPrefix(first, shared, rows, shape.path // 2)
        layout = StaticLayout(table, lengths, self._starts[: rows + 1], prefix, self._run.backend)
        ids, positions = self.field("ids", rows).long(), self.field("positions", rows).long()
        hidden = self._run.hidden(ids, positions, Packed(self._run.pool, slots, layout))
        if self._out is None:
            self._out = hidden.new_zeros((ROWS, hidden.shape[1]))
        self._out[:rows].copy_(hidden)

    def result(self, shape: Shape) -> torch.Tensor:
        """[rows, D] what `compute` left: a view, which the next step writes."""
        if self._out is None:
            raise RuntimeError("no step has been computed")
        return self._out[: shape.rows]


@dataclass(frozen=True)
class StaticLayout:
    """Attention of one token a line over a static slot table.

    Attributes:
        table: [B, S] int32 slots.
        lengths: [B] int32; 0 for padding.
        starts: [B + 1] int32, 0 .. B.
        prefix: what neighbours share; None: not told.
        backend: of the op.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    prefix: SharedPrefix | None
    backend: Backend

    def attend(self, operands: Operands) -> torch.Tensor:
        """As TorchLayout.attend."""
        query, modifiers = operands.query, operands.modifiers
        return tree_attention(
            query.transpose(0, 1),
            operands.keys,
            operands.values,
            slot_table=self.table,
            path_lens=self.lengths,
            q_starts=self.starts,
            scale=modifiers.scale,
            softcap=modifiers.softcap,
            window=modifiers.window,
            sinks=modifiers.sinks,
            max_new=1,
            max_path=self.table.shape[1],
            prefix=self.prefix,
            backend=self.backend,
        )


class StaticForward:
    """A step, planned; see PackedForward.

    Attributes:
        order: the pieces as they came.
    """

    def __init__(
        self,
        step: StaticStep,
        launch: Callable[[Shape], None],
        wave: Sequence[Piece],
        slots: Sequence[np.ndarray],
    ) -> None:
        self._step, self._launch = step, launch
        self._wave, self._slots = wave, slots
        self.order = list(range(len(wave)))

    def run(
        self, also: Sequence[np.ndarray], ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As PackedForward.run."""
        step, count = self._step, len(self._wave)
        try:
            shape = step.load(self._wave, self._slots, also)
            if ids is not None:
                step.field("ids", shape.rows).index_copy_(0, step.field("lines", count).long(), ids.int())
            self._launch(shape)
        except BaseException:  # the table may hold anything
            step.lines.forget()
            raise
        rest = [step.field(name, len(array)).long() for name, array in zip(_ALSO, also, strict=True)]
        return step.result(shape).index_select(0, step.field("lines", count)), rest
