"""Calls under way: what has been launched on a device, and what is done once its numbers are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from .hidden_rows import WaveRows
    from .kv_tree import Branch, KVTree

T = TypeVar("T")


class Pending(Generic[T]):
    """The result of LanguageModel.begin_* to come: the forwards are launched, nothing has been waited for.

    Begin the calls of several models before the first `result`, and the device has all of their work at once.

    Args:
        finish: reads the numbers; raises what is wrong with them. Called once.
        undo: takes back what the call did, for a caller that finds something wrong with its result.
        stream: the CUDA stream that the forwards were launched on; None for the caller's own.
    """

    def __init__(
        self,
        finish: Callable[[], T],
        undo: Callable[[], None] = lambda: None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._finish = finish
        self.undo = undo
        self._done = None if stream is None else stream.record_event()
        self._device = None if stream is None else stream.device

    def result(self) -> T:
        """Wait, and return what the call returns. Raises ValueError where the model computed NaN."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        return self._finish()


@dataclass
class _Before:
    branch: Branch
    encoded: int
    hidden: torch.Tensor | None
    hidden_at: int
    fork_rows: set[int]
    seen: int


class Undo:
    """The state of branches before a call, so that a call that fails leaves them as they were.

    Args:
        tree: theirs.
    """

    def __init__(self, tree: KVTree) -> None:
        self._tree = tree
        self._before: list[_Before] = []

    def note(self, branch: Branch) -> None:
        """Remember a branch as it is now."""
        known = {own for own, row in branch.fork_rows.items() if row is not None}
        self._before.append(_Before(branch, branch.encoded, branch.hidden, branch.hidden_at, known, branch.seen))

    def roll_back(self) -> None:
        """Back to what was noted, the newest first. What was evicted or released meanwhile stays so."""
        with self._tree.lock:
            for before in reversed(self._before):
                branch = before.branch
                if branch.released:
                    continue
                if branch.encoded > before.encoded:  # what was put on top in this call has just been taken back
                    self._tree.give_back(branch, branch.encoded - before.encoded)
                branch.hidden, branch.hidden_at, branch.seen = before.hidden, before.hidden_at, before.seen
                for own in branch.fork_rows.keys() - before.fork_rows:
                    branch.fork_rows[own] = None
            self._before.clear()


class Launched:
    """The log-probabilities that a call's forwards compute, on the device until they are read together.

    Args:
        branches: ids of the branches whose log-probabilities are asked for.
    """

    def __init__(self, branches: Sequence[int]) -> None:
        self._found: dict[int, list[np.ndarray]] = {key: [] for key in branches}
        self._waves: list[tuple[WaveRows, torch.Tensor]] = []

    def add(self, rows: WaveRows, logprobs: torch.Tensor) -> None:
        """The targets of a forward and their log-probabilities, [N]."""
        self._waves.append((rows, logprobs))

    def numbers(self) -> torch.Tensor | None:
        """All of them, in one piece; None where nothing is scored."""
        parts = [logprobs for _, logprobs in self._waves]
        return torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)

    def read(self, numbers: np.ndarray) -> list[np.ndarray]:
        """One array a branch, of `numbers` on the host."""
        at = 0
        for rows, logprobs in self._waves:
            rows.hand_out(numbers[at : at + len(logprobs)], self._found)
            at += len(logprobs)
        return [np.concatenate(parts) if parts else np.zeros(0, np.float32) for parts in self._found.values()]
