"""LanguageModel: a causal LM that encodes each token of a tree of branches once.

`extend` appends tokens to branches and encodes them, with whatever of their paths is missing, in as few packed
forwards as the KV capacity allows. It knows branches, not searches: `memo.py` ties it to those.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ..checks import integer
from ..triton_kernels.launch import Backend
from . import adapters, admission
from .attention import Layout, Packed, packed
from .head import Head
from .kernel_layout import KernelLayout
from .kv_tree import Branch, KVTree
from .layout import Unit
from .limits import context_of, default_capacity
from .plan import Piece, chains, missing, next_batch, split
from .pool import KVPool
from .rows import WaveRows
from .torch_layout import TorchLayout

if TYPE_CHECKING:
    from ..tree import SearchTree
    from .memo import Memo

Want = Literal["target", "hidden", "log_softmax"]

_ids = itertools.count(1)
_process = secrets.token_hex(3)  # in ids: a tree that another process saved carries none of this one's models
_interned: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, weakref.ref[LanguageModel]]] = (
    weakref.WeakKeyDictionary()
)
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_interning = threading.RLock()


class LanguageModel:
    """Use `LanguageModel.of`, which admits what is served exactly and returns the same object for the same weights.

    Args:
        module: a transformers causal LM, unwrapped and in eval mode.
        state: adapters to run with; None for the base weights.
        capacity: tokens whose KV is held at once.
        forward_tokens: tokens of one forward at most; longer work is cut into several.
        backend: of the kernels: "auto" takes Triton on a GPU where it serves the operands, else torch.

    Attributes:
        id: says which weights these are; equal ids mean equal log-probabilities.
        tree: the branches.
        forwards: forward calls so far.
        context: tokens of the longest path the model takes, or None where its config does not say.
    """

    def __init__(
        self,
        module: Any,
        state: tuple[str, ...] | None = None,
        *,
        capacity: int,
        forward_tokens: int = 4096,
        backend: Backend = "auto",
    ) -> None:
        self.module = module
        self.state = state
        self.config = module.config.get_text_config()
        self.context = context_of(self.config)
        self.backend = backend
        self.head = Head(module, backend)
        self.forward_tokens = forward_tokens
        self.forwards = 0
        self._layers = adapters.tuner_layers(module)
        self._configs = _configs_of(module)
        self._lock = _locks.setdefault(module, threading.RLock())
        self._memos: weakref.WeakKeyDictionary[SearchTree, Memo] = weakref.WeakKeyDictionary()
        name = getattr(module.config, "_name_or_path", "") or type(module).__name__
        self.id: Hashable = f"{name}{'' if state is None else '+' + '+'.join(state)}#{_process}.{next(_ids)}"
        self.tree = KVTree(capacity)
        self.pool = KVPool(self.tree.capacity)

    @classmethod
    def of(
        cls, module: nn.Module | LanguageModel, *, adapter: str | None = adapters.AUTO, capacity: int | None = None
    ) -> LanguageModel:
        """The LanguageModel of these weights: the same module in the same adapter state gives the same object.

        Args:
            module: a causal LM, also wrapped by PEFT or torch.compile, or a LanguageModel (returned as it is).
            adapter: "auto" (a PeftModel's active adapter, otherwise the base weights), an adapter's name, or None
                for the base weights.
            capacity: tokens of KV, None for what DEFAULT_BYTES hold; must agree with an earlier request for the same
                weights.

        Raises:
            TypeError: not a causal LM of transformers.
            ValueError: the model is not served exactly (see admission); its adapters leave open what is meant (see
                adapters); or capacity differs from the one in use, or is below 1.
        """
        if capacity is not None:
            integer("capacity", capacity, 1, "a number of tokens >= 1, or None,")
        if isinstance(module, LanguageModel):
            return module
        if not isinstance(module, nn.Module):
            raise TypeError(f"a causal LM (nn.Module) is needed, got {type(module).__name__}")
        base = adapters.unwrap(module)
        if not hasattr(base, "config") or not hasattr(base, "get_output_embeddings"):
            raise TypeError(f"{type(base).__name__} is not a transformers causal LM")
        state = adapters.adapter_state(module, adapter)
        with _interning:
            known = _interned.setdefault(base, {})
            found = known[state]() if state in known else None
            if found is None:
                width = admission.check(base, state, cls)
                found = cls(base, state, capacity=capacity or default_capacity(adapters.device_of(base), width))
                known[state] = weakref.ref(found)
            elif capacity is not None and capacity != found.tree.capacity:
                raise ValueError(
                    f"capacity={capacity}: this model is in use with {found.tree.capacity} tokens of KV already"
                )
            return found

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return adapters.device_of(self.module)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The module for this thread alone, with these weights' adapters switched on."""
        with self._lock, adapters.switched(self._layers, self.state) if self._layers else nullcontext():
            yield

    def memo(self, tree: SearchTree) -> Memo:
        """What is known of a search tree's nodes under these weights; made on first use."""
        from .memo import Memo

        memo = self._memos.get(tree)
        if memo is None:
            with self.tree.lock:  # no forward of another thread is under way
                if not self.tree.used:
                    self.pool.follow(self.module.get_input_embeddings().weight)
                    if self.module.get_output_embeddings() is not self.head.linear:  # resized or exchanged
                        self.head = Head(self.module, self.backend)
            self._layers = adapters.tuner_layers(self.module)  # adapters may have been injected since
            memo = self._memos[tree] = Memo(self, tree)
        return memo

    def release(self, tree: SearchTree) -> None:
        """Forget a search tree and free its KV."""
        memo = self._memos.pop(tree, None)
        if memo is not None:
            memo.free()

    def forget(self) -> None:
        """Forget what was computed under weights that change: log-probs, KV, and the id that vouched for them.

        For between searches; trees that are kept are encoded again when they are next asked about.

        Raises:
            ValueError: a search is under way.
        """
        for tree in list(self._memos):
            self.release(tree)
        if self.tree.used:
            raise ValueError("a search is under way, whose KV would be of other weights: end or cancel it first")
        self.id = f"{str(self.id).rpartition('#')[0]}#{next(_ids)}"

    def extend(
        self, branches: Sequence[Branch], ids: Sequence[Sequence[int]], want: Want | None = "target"
    ) -> list[np.ndarray] | torch.Tensor | None:
        """Append ids[i] to branches[i] and encode everything on their paths that has no KV.

        A branch's ancestors may stand in the same call; they are encoded in the same forward.

        Args:
            branches: B different branches of this model's tree.
            ids: new tokens of each, possibly none.
            want: "target": log-probability of each new token; "hidden": the last hidden row of each branch;
                "log_softmax": the next-token distribution after each branch; None: only encode.

        Returns:
            "target": B arrays [len(ids[i])] fp32, nats, NaN for a token with nothing before it;
            "hidden": [B, D]; "log_softmax": [B, V] fp32 (fp64 for an fp64 model), nats.

        Raises:
            ValueError: a path with its new tokens exceeds the KV capacity or the context, a token id lies outside the
                vocabulary, or the model computes NaN.
        """
        self._validate(branches, ids)
        with self.exclusive(), self.tree.lock, torch.no_grad():  # the head may have an adapter too
            heads = [len(branch.token_ids) for branch in branches]
            rows_before = [(branch.hidden, branch.hidden_at) for branch in branches]
            for branch, new in zip(branches, ids, strict=True):
                branch.token_ids.extend(int(i) for i in new)
            try:
                found = self._encode(branches, heads if want == "target" else None)
                if want == "target":
                    return found
                if want is None:
                    return None
                rows = torch.stack([branch.end_row() for branch in branches])
                if want == "hidden":
                    return rows
                table = self.head.log_softmax(rows)
                self._refuse_nan(bool(table[:, :1].isnan().any()))  # one NaN, or inf, makes a whole row NaN
                return table
            except BaseException:  # as if nothing had been appended: an earlier wave may have gone through
                for branch, head, row in zip(branches, heads, rows_before, strict=True):
                    self.tree.give_back(branch, max(0, branch.encoded - head))
                    del branch.token_ids[head:]
                    branch.hidden, branch.hidden_at = row
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
        self._validate(branches, [()] * len(branches))
        if any(branch.encoded or branch.hidden is not None for branch in branches):
            raise ValueError("a branch has been encoded before: its rows are gone, score a fork of its parent")
        for part in {id(part): part for branch in branches for part in branch.lineage() if not part.encoded}.values():
            self._check_ids(part.token_ids)
        with self.exclusive(), self.tree.lock, torch.no_grad():  # the head may have an adapter too
            return self._encode(branches, [0] * len(branches) if skip is None else skip)

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

    def _refuse_nan(self, found: bool) -> None:
        if found:
            raise ValueError(
                f"{self.id} gives probabilities that are not numbers: its weights hold NaN or inf, or what it computes "
                f"is beyond {str(self.module.dtype).removeprefix('torch.')}"
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) and not (min(ids) >= 0 and max(ids) < self.head.vocab):
            raise ValueError(f"token ids {min(ids)}..{max(ids)} lie outside the vocabulary of {self.head.vocab}")

    def _encode(self, branches: Sequence[Branch], score_from: Sequence[int] | None) -> list[np.ndarray]:
        """Encode what is missing, cut into forwards that fit the capacity and forward_tokens; pins while one runs.

        Returns:
            log-probs of each branch's own tokens from score_from[i] on; empty arrays where that is None.
        """
        targets: dict[int, tuple[int, int]] = {}
        found: dict[int, list[np.ndarray]] = {id(branch): [] for branch in branches}
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
                    self._forward(wave, targets, found)
            finally:
                for branch, _ in batch.path:
                    branch.pins -= 1
            pending = pending[batch.branches :]
        return [np.concatenate(found[id(b)]) if found[id(b)] else np.zeros(0, np.float32) for b in branches]

    def _forward(
        self, wave: Sequence[Piece], targets: dict[int, tuple[int, int]], found: dict[int, list[np.ndarray]]
    ) -> None:
        """Encode the pieces, keep each branch's last hidden row, and score the target tokens among them."""
        before = [piece.branch.encoded for piece in wave]
        try:
            hidden, order = self._encoded(wave)
            rows = WaveRows(wave, order, hidden)
            rows.bound()
            wanted = rows.targets(targets)
            if wanted is not None:
                flat = self.head.logprobs(wanted.hidden, wanted.ids).cpu().numpy()
                self._refuse_nan(bool(np.isnan(flat).any()))
                wanted.hand_out(flat, found)
        except BaseException:  # KV that nobody has the hidden rows of, or that was never written
            for piece, encoded in zip(reversed(wave), reversed(before), strict=True):
                self.tree.give_back(piece.branch, piece.branch.encoded - encoded)
            raise
        self.forwards += 1
        rows.keep(self.id)

    def _encoded(self, wave: Sequence[Piece]) -> tuple[torch.Tensor, list[int]]:
        """[T, D] last hidden rows of the pieces, and the order in which those are packed."""
        slots = [self.tree.take(piece.branch, piece.end - piece.begin) for piece in wave]
        runs = chains(wave)
        units = []
        for chain in runs:
            top = wave[chain[0]].branch
            stem = id(top) if top.parent is None else hash((id(top.parent), top.start))
            new = sum(len(slots[i]) for i in chain)
            units.append(Unit(wave[chain[-1]].branch.path_slots(), new, stem, top.start))
        layout = self._layout(units)
        packing = [i for unit in layout.order for i in runs[unit]]  # pieces in packed order
        ids = [t for i in packing for t in wave[i].branch.token_ids[wave[i].begin : wave[i].end]]
        starts = [wave[i].branch.start + wave[i].begin for i in packing]
        positions = np.concatenate([np.arange(s, s + len(slots[i])) for s, i in zip(starts, packing, strict=True)])
        forward = Packed(self.pool, np.concatenate([slots[i] for i in packing]), layout)
        return self._hidden(ids, positions, forward), packing

    def _layout(self, units: Sequence[Unit]) -> Layout:
        if self.backend == "torch" or (self.backend == "auto" and self.device.type != "cuda"):
            return TorchLayout(units)
        return KernelLayout(units, self.backend)

    def _hidden(self, ids: list[int], positions: np.ndarray, forward: Packed) -> torch.Tensor:
        """[T, D] last hidden rows of the packed tokens."""
        if self.module.training:
            raise ValueError(f"{self.id} is in training mode, where dropout randomises probabilities: call .eval()")
        device = self.device
        with packed(self._configs, forward):
            out = self.module.base_model(
                input_ids=torch.tensor([ids], dtype=torch.long, device=device),
                position_ids=torch.from_numpy(positions).to(device)[None],
                use_cache=False,
            )
        return out[0][0]


def _configs_of(module: Any) -> list[Any]:
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    return [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
