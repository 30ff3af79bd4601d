"""Token steps replayed from tapes: what CUDA graphs are to a GPU, for a host whose Python is slower than the step."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import torch

from ..attention.hook import Packed
from ..module_run import ModuleRun
from .cuda_graphs import obstacle_in
from .tape import Recorder, Tape, Unrecordable

KEPT = 256  # tapes of one model at most: one more, and all of them go
USES = 6  # steps of so many rows before one is recorded: rows that come and go are hardly ever so many again
PROOFS = 2  # tapes of a module that are compared with it


class Tapes:
    """The tapes of one LanguageModel, one for each number of rows.

    The steps after the first two that are recorded run both ways: whether a forward does the same each time is in the
    nature of the module, not of the number of rows. Where a tape gives other bits, or the forward is no straight line
    of torch calls, steps run eagerly from then on, and `refused` says why.

    Args:
        run: of the module.
    """

    def __init__(self, run: ModuleRun) -> None:
        self._run = run
        self._proven: dict[int, Tape] = {}
        self._recorded: dict[int, Tape] = {}
        self._uses: Counter[int] = Counter()
        self._proofs = 0
        self.refused: str | None = None
        self.replays = 0

    def forget(self) -> None:
        """Drop everything: the module computes something else from now on."""
        self._proven.clear()
        self._recorded.clear()
        self._uses.clear()
        self._proofs = 0
        self.refused = None

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, forward: Packed) -> torch.Tensor:
        """As ModuleRun.hidden, for one token of each row."""
        rows = len(ids)
        tape = self._proven.get(rows)
        if tape is not None:
            self.replays += 1
            return tape(ids, positions, forward.attend)
        if self.refused is not None:
            return self._run.hidden(ids, positions, forward)
        self._uses[rows] += 1
        if self._uses[rows] < USES:
            return self._run.hidden(ids, positions, forward)
        if rows in self._recorded:
            return self._tried(ids, positions, forward)
        return self._record(ids, positions, forward)

    def _record(self, ids: torch.Tensor, positions: torch.Tensor, forward: Packed) -> torch.Tensor:
        if len(self._proven) + len(self._recorded) >= KEPT:
            self.forget()
        self.refused = _obstacle(self._run.module)
        if self.refused is not None:
            return self._run.hidden(ids, positions, forward)
        module = self._run.module
        recorder = Recorder(ids, positions, chain(module.parameters(), module.buffers(), [forward.no_mask]))
        try:
            with recorder:
                hidden = self._run.hidden(ids, positions, recorder.watch(forward))
            kept = self._recorded if self._proofs < PROOFS else self._proven
            kept[len(ids)] = recorder.tape(hidden)
        except Unrecordable as why:
            self.refused = str(why)
            del forward.attend
            return self._run.hidden(ids, positions, forward)
        return hidden

    def _tried(self, ids: torch.Tensor, positions: torch.Tensor, forward: Packed) -> torch.Tensor:
        """Run a step both ways: it writes the same twice."""
        hidden = self._run.hidden(ids, positions, forward)
        tape = self._recorded.pop(len(ids))
        again = tape(ids, positions, forward.attend)
        if again.shape == hidden.shape and torch.equal(again.view(torch.uint8), hidden.view(torch.uint8)):
            self._proven[len(ids)] = tape
            self._proofs += 1
        else:
            self.forget()
            self.refused = "a tape gave other numbers than the eager step"
        return hidden


def _obstacle(module: object) -> str | None:
    """Why no step of a module is recorded, by what is known of it; None where nothing is."""
    parts = module.modules()  # type: ignore[attr-defined]
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        return "it is compiled"
    return obstacle_in(module)
