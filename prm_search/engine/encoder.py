"""Encoder: a causal LM that encodes each token of a tree of branches once.

`extend` appends tokens to branches and encodes them, with whatever of their paths is missing, in as few packed
forwards as the KV capacity allows; `score` encodes branches and says how probable they were.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from ..triton_kernels.launch import Backend
from . import adapters
from .admission.context_limits import context_of
from .graph_step.choice import TokenSteps
from .head import Head
from .hidden_rows import WaveRows
from .kv_tree import Branch, KVTree
from .module_run import ModuleRun, own_modes
from .pending import Launched, Pending, Undo
from .pool import KVPool
from .runner import Runner
from .waves import Piece, missing, next_batch, split

T = TypeVar("T")
Want = Literal["target", "hidden", "logits", "log_softmax"]

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class Encoder:
    """A module in one adapter state, its branches and their KV. LanguageModel is one with an identity.

    Args:
        module: a transformers causal LM, unwrapped and in eval mode.
        state: adapters to run with; None for the base weights.
        name: its id.
        capacity: tokens whose KV is held at once.
        forward_tokens: tokens of one forward at most; longer work is cut into several.
        backend: of the kernels.

    Attributes:
        id: says which weights these are; equal ids mean equal log-probabilities.
        tree: the branches.
        forwards: forward calls so far.
        wasted: tokens encoded ahead of the host's knowledge that their row had ended.
        stream: the CUDA stream that its forwards run on, see `own_stream`; None for the caller's, which has to be the
            same in every call.
        context: tokens of the longest path the model takes, or None where its config does not say.
    """

    def __init__(
        self,
        module: Any,
        state: tuple[str, ...] | None,
        name: str,
        capacity: int,
        forward_tokens: int,
        backend: Backend,
    ) -> None:
        self.module = module
        self.state = state
        self.id: Hashable = name
        self.config = module.config.get_text_config()
        self.context = context_of(self.config)
        self.backend = backend
        self.head = Head(module, backend)
        self.forward_tokens = forward_tokens
        self.forwards = self.wasted = 0
        self.stream: torch.cuda.Stream | None = None
        self._layers = adapters.tuner_layers(module)
        self._lock = _locks.setdefault(module, threading.RLock())
        self.tree = KVTree(capacity)
        self.pool = KVPool(self.tree.capacity)
        self.runner = Runner(ModuleRun(module, self.pool, backend))

    @property
    def device(self) -> torch.device:
        """Return where input ids go."""
        return adapters.device_of(self.module)

    @property
    def token_steps(self) -> TokenSteps:
        """Return the runner of one token for each of a few branches; `token_steps.choice(rows, longest)` says which."""
        return self.runner.token_steps

    @property
    def steps(self) -> TokenSteps:
        """The former name of `token_steps`."""
        return self.token_steps

    def own_stream(self, on: bool) -> None:
        """Run this model's forwards on a CUDA stream of its own, beside those of other models, or no longer do so.

        Without one, models whose calls are begun together run one after the other, without a gap. No result changes.

        Raises:
            ValueError: the model is not on a CUDA device.
        """
        if on and self.device.type != "cuda":
            raise ValueError(f"{self.id} is on {self.device}: streams of their own are for models on a CUDA device")
        with self._lock, self.tree.lock:
            if on != (self.stream is not None):
                torch.cuda.synchronize(self.device)  # its memory changes hands between streams
                self.stream = torch.cuda.Stream(self.device) if on else None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The module for this thread alone, with these weights' adapters switched on."""
        with self._lock, adapters.switched(self._layers, self.state) if self._layers else nullcontext():
            yield

    def extend(
        self, branches: Sequence[Branch], ids: Sequence[Sequence[int]], want: Want | None = "target"
    ) -> list[np.ndarray] | torch.Tensor | None:
        """Append ids[i] to branches[i] and encode everything on their paths that has no KV.

        A branch's ancestors may stand in the same call; they are encoded in the same forward.

        Args:
            branches: B different branches of this model's tree.
            ids: new tokens of each, possibly none.
            want: "target": log-probability of each new token; "hidden": the last hidden row of each branch;
                "log_softmax": the next-token distribution after each branch; "logits": the same before it is
                normalised, and not looked at for numbers that are none; None: only encode.

        Returns:
            "target": B arrays [len(ids[i])] fp32, nats, NaN for a token with nothing before it;
            "hidden": [B, D]; "logits", "log_softmax": [B, V] fp32 (fp64 for an fp64 model), nats.

        Raises:
            ValueError: a path with its new tokens exceeds the KV capacity or the context, a token id lies outside the
                vocabulary, or the model computes NaN.
        """
        return self.begin_extend(branches, ids, want).result()

    def begin_extend(
        self, branches: Sequence[Branch], ids: Sequence[Sequence[int]], want: Want | None = "target"
    ) -> Pending[list[np.ndarray] | torch.Tensor | None]:
        """`extend`, launched and not waited for. The branches are not to be used before its result is there.

        Raises:
            ValueError: as extend, here or by the result.
        """
        self._validate(branches, ids)
        with self._running():
            heads = [len(branch.token_ids) for branch in branches]
            undo = Undo(self.tree)
            for branch in branches:
                undo.note(branch)
            for branch, new in zip(branches, ids, strict=True):
                branch.token_ids.extend(int(i) for i in new)

            def undone() -> None:  # as if nothing had been appended: an earlier wave may have gone through
                undo.roll_back()
                for branch, head in zip(branches, heads, strict=True):
                    del branch.token_ids[head:]

            try:
                launched = self._encode(branches, heads if want == "target" else None, undo)
                if want == "target":
                    return self._pending(launched.numbers(), launched.read, undone)
                if want is None:
                    return self._pending(None, lambda _: None, undone)
                rows = torch.stack([branch.end_row() for branch in branches])
                if want == "hidden":
                    return self._pending(None, lambda _: self._handed_over(rows), undone)
                if want == "logits":
                    logits = self.head.logits(rows)
                    return self._pending(None, lambda _: self._handed_over(logits), undone)
                table = self.head.log_softmax(rows)
                # One NaN, or inf, makes a whole row NaN.
                return self._pending(table[:, :1], lambda _: self._handed_over(table), undone)
            except BaseException:
                undone()
                raise

    def score(self, branches: Sequence[Branch], skip: Sequence[int] | None = None) -> list[np.ndarray]:
        """Encode branches that were never encoded and return the log-probabilities of their own tokens.

        Args:
            branches: B different branches, each after its ancestors where those are in the call too.
            skip: own tokens of each, counted from its first, that need no log-probability: the one that a fork
                inside a branch encodes again. None: none.

        Returns:
            As extend(want="target").

        Raises:
            ValueError: as extend; or a branch has been encoded before.
        """
        return self.begin_score(branches, skip).result()

    def begin_score(self, branches: Sequence[Branch], skip: Sequence[int] | None = None) -> Pending[list[np.ndarray]]:
        """`score`, launched and not waited for; as begin_extend."""
        self._validate(branches, [()] * len(branches))
        if any(branch.encoded or branch.hidden is not None for branch in branches):
            raise ValueError("a branch has been encoded before: its rows are gone, score a fork of its parent")
        for part in {id(part): part for branch in branches for part in branch.lineage() if not part.encoded}.values():
            self._check_ids(part.token_ids)
        with self._running():
            undo = Undo(self.tree)
            try:
                launched = self._encode(branches, [0] * len(branches) if skip is None else skip, undo)
                return self._pending(launched.numbers(), launched.read, undo.roll_back)
            except BaseException:
                undo.roll_back()
                raise

    def _validate(self, branches: Sequence[Branch], ids: Sequence[Sequence[int]]) -> None:
        if len(branches) != len(ids):
            raise ValueError(f"{len(branches)} branches but {len(ids)} lists of ids")
        if len({id(b) for b in branches}) != len(branches):
            raise ValueError("a branch stands twice in one call")
        for branch, new in zip(branches, ids, strict=True):
            if branch.released:
                raise ValueError("a released branch cannot be extended")
            self._check_ids(new)
            length = branch.length + len(new)
            if length > self.tree.capacity:
                raise ValueError(f"a path of {length} tokens exceeds the KV capacity of {self.tree.capacity} tokens")
            if self.context is not None and length > self.context:
                raise ValueError(f"a path of {length} tokens exceeds the model's context of {self.context} tokens")
            if length == 0:
                raise ValueError("an empty path cannot be encoded: a prompt needs at least one token")

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> None:
        if not len(ids):
            return
        low, high = (ids.min(), ids.max()) if isinstance(ids, np.ndarray) else (min(ids), max(ids))
        if not (low >= 0 and high < self.head.vocab):
            raise ValueError(f"token ids {low}..{high} lie outside the vocabulary of {self.head.vocab}")

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Everything that a forward needs: the module, the slots, the stream, and nothing of the caller's modes."""
        with self.exclusive(), self.tree.lock, own_modes(self.device.type):  # the head may have an adapter too
            if self.stream is None:
                yield
            else:
                self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
                with torch.cuda.stream(self.stream):
                    yield

    def _pending(
        self, numbers: torch.Tensor | None, read: Callable[[np.ndarray], T], undone: Callable[[], None]
    ) -> Pending[T]:
        """A call whose forwards are launched.

        Args:
            numbers: what the host has to see before the call is good; None: nothing.
            read: makes the call's result of them, once they are there and none is NaN.
            undone: takes back what the call did, for when one is.
        """

        def finish() -> T:
            try:
                host = np.empty(0) if numbers is None else numbers.cpu().numpy()
                if np.isnan(host).any():
                    raise self.not_numbers()
                return read(host)
            except BaseException:
                undone()
                raise

        return Pending(finish, undone, self.stream)

    def not_numbers(self) -> ValueError:
        """Return the error of a model that computes NaN."""
        return ValueError(
            f"{self.id} gives probabilities that are not numbers: its weights hold NaN or inf, or what it computes is "
            f"beyond {str(self.module.dtype).removeprefix('torch.')}"
        )

    def _handed_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """A result of this model's stream, kept in memory until the caller's stream is done with it."""
        if self.stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self.stream.device))
        return tensor

    def _encode(self, branches: Sequence[Branch], score_from: Sequence[int] | None, undo: Undo) -> Launched:
        """Encode what is missing, cut into forwards that fit the capacity and forward_tokens; pins while one runs.

        Args:
            branches: whose paths.
            score_from: own tokens of each from which on log-probs are wanted; None: none.
            undo: notes what is changed.
        """
        if self.module.training:
            raise ValueError(f"{self.id} is in training mode, where dropout randomises probabilities: call .eval()")
        launched = Launched([id(branch) for branch in branches])
        targets: dict[int, tuple[int, int]] = {}
        if score_from is not None:
            targets = {id(b): (low, len(b.token_ids)) for b, low in zip(branches, score_from, strict=True)}
        pending = [branch for branch in branches if missing(branch)]
        while pending:
            batch = next_batch(pending, self.tree.capacity, self.tree.free, self.forward_tokens)
            for branch in pending[: batch.branches]:
                self.tree.touch(branch)  # an ancestor is as young as its youngest resident child
            for branch, _ in batch.path:
                branch.pins += 1
            try:
                for wave in split(batch.pieces, self.forward_tokens):
                    self.tree.reserve(sum(p.end - p.begin for p in wave), batch.path)
                    for piece in wave:
                        undo.note(piece.branch)
                    self._forward(wave, targets, launched)
            finally:
                for branch, _ in batch.path:
                    branch.pins -= 1
            # What this batch encoded may have been all that a later branch lacked.
            pending = [branch for branch in pending[batch.branches :] if missing(branch)]
        return launched

    def _forward(self, wave: Sequence[Piece], targets: Mapping[int, tuple[int, int]], launched: Launched) -> None:
        """Encode the pieces, keep each branch's last hidden row, and score the target tokens among them."""
        slots = [self.tree.take(piece.branch, piece.end - piece.begin) for piece in wave]
        forward = self.runner.plan(wave, slots)
        rows = WaveRows(wave, forward.order, targets)
        hidden, (ends, ids) = forward.run([rows.ends, rows.targets.ids])
        self.forwards += 1
        rows.keep_at_forks(hidden)
        before = rows.scored(hidden)
        if before is not None:
            launched.add(rows, self.head.logprobs(before, ids))
        rows.keep(hidden, ends, self.id)
