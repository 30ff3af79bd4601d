"""LanguageModel: one set of weights, found again for the same module, with what it knows of each search.

How it encodes is in `encoder.py`, which knows branches and no search; `memo.py` and `node_logprobs.py` tie the two
together.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checks import integer
from ..triton_kernels.launch import Backend
from . import adapters
from .admission import check as admission
from .admission.context_limits import default_capacity
from .head import Head
from .memo import Memo
from .row_encoder import RowEncoder
from .texts import TextBranches

if TYPE_CHECKING:
    from ..tree import SearchTree

_ids = itertools.count(1)
_process = secrets.token_hex(3)  # in ids: a tree that another process saved carries none of this one's models
_interned: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, weakref.ref[LanguageModel]]] = (
    weakref.WeakKeyDictionary()
)
_interning = threading.RLock()


def promised_on(device: torch.device) -> int:
    """Bytes of KV that the models on a device may take beyond what they hold already."""
    with _interning:
        lms = [lm for known in list(_interned.values()) for kept in known.values() if (lm := kept()) is not None]
    return sum(lm.promised for lm in lms if lm.device == device)


class LanguageModel(RowEncoder):
    """Use `LanguageModel.of`, which admits what is served exactly and returns the same object for the same weights.

    Args:
        module: a transformers causal LM, unwrapped and in eval mode.
        state: adapters to run with; None for the base weights.
        capacity: tokens whose KV is held at once.
        forward_tokens: tokens of one forward at most; longer work is cut into several.
        backend: of the kernels: "auto" takes Triton on a GPU where it serves the operands, else torch.

    Attributes: see Encoder; and
        token_bytes: KV that a token takes, as far as known.
    """

    token_bytes = 0

    def __init__(
        self,
        module: Any,
        state: tuple[str, ...] | None = None,
        *,
        capacity: int,
        forward_tokens: int = 4096,
        backend: Backend = "auto",
    ) -> None:
        name = getattr(module.config, "_name_or_path", "") or type(module).__name__
        name += f"{'' if state is None else '+' + '+'.join(state)}#{_process}.{next(_ids)}"
        super().__init__(module, state, name, capacity, forward_tokens, backend)
        self._memos: dict[SearchTree, Memo] = {}  # until `release`: a memo's nodes hold their tree
        self._texts: dict[SearchTree, TextBranches] = {}

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
                adapters); capacity differs from the one in use, or is below 1; or there are fewer than 2 tokens.
        """
        if capacity is not None:
            integer("capacity", capacity, 1, "a number of tokens >= 1, or None,")
        if isinstance(module, LanguageModel):
            return module
        if not isinstance(module, nn.Module):
            raise TypeError(f"a causal LM (nn.Module) as model is needed, got {type(module).__name__}")
        base = adapters.unwrap(module)
        if not hasattr(base, "config") or not hasattr(base, "get_output_embeddings"):
            raise TypeError(f"{type(base).__name__} is not a transformers causal LM")
        state = adapters.adapter_state(module, adapter)
        with _interning:
            known = _interned.setdefault(base, {})
            lm = known[state]() if state in known else None
            if lm is None:
                width = admission.check(base, state, cls)
                wrapper = adapters.wrapper_of(module)
                if wrapper is not None and state is not None:
                    admission.check_wrapper(wrapper, base, state)
                device = adapters.device_of(base)
                lm = cls(base, state, capacity=capacity or default_capacity(device, width, promised_on(device)))
                if lm.head.vocab < 2:
                    raise ValueError(f"{lm.id} has a vocabulary of {lm.head.vocab} token: at least 2 are needed")
                lm.token_bytes = width
                known[state] = weakref.ref(lm)
            elif capacity is not None and capacity != lm.tree.capacity:
                raise ValueError(
                    f"capacity={capacity}: this model is in use with {lm.tree.capacity} tokens of KV already"
                )
            return lm

    @property
    def promised(self) -> int:
        """Bytes of KV that this model may take beyond what its pools hold already."""
        return max(0, self.tree.capacity * self.token_bytes - self.pool.bytes())

    def memo(self, tree: SearchTree) -> Memo:
        """Return what is known of a search tree's nodes under these weights; made on first use."""
        memo = self._memos.get(tree)
        if memo is None:
            self._meet()
            memo = self._memos[tree] = Memo(self.tree, tree)
        return memo

    def texts(self, tree: SearchTree) -> TextBranches:
        """Return the texts that are asked about for a search tree, beside its nodes; made on first use."""
        texts = self._texts.get(tree)
        if texts is None:
            self._meet()
            texts = self._texts[tree] = TextBranches(self.tree, tree.meter, self.id)
        return texts

    def refresh(self) -> None:
        """Forget the graphs and tapes of token steps if weights, adapters or hooks are others than they were."""
        with self.tree.lock:  # no forward of another thread is under way
            self.token_steps.refresh(adapters.tuner_layers(self.module))  # whoever else is searching

    def _meet(self) -> None:
        """Look at the module again before a search begins: weights may have moved, and heads or adapters changed."""
        with self.tree.lock:
            self.refresh()
            if not self.tree.used:
                self.pool.follow(self.module.get_input_embeddings().weight)
                if self.module.get_output_embeddings() is not self.head.linear:  # resized or exchanged
                    self.head = Head(self.module, self.backend)
        self._layers = adapters.tuner_layers(self.module)  # adapters may have been injected since

    def release(self, tree: SearchTree) -> None:
        """Forget a search tree and free its KV."""
        for known in (self._memos.pop(tree, None), self._texts.pop(tree, None)):
            if known is not None:
                known.free()

    def forget(self) -> None:
        """Forget what was computed under weights that change: log-probs, KV, and the id that vouched for them.

        For between searches; trees that are kept are encoded again when they are next asked about.

        Raises:
            ValueError: a search is under way.
        """
        for tree in [*self._memos, *self._texts]:
            self.release(tree)
        if self.tree.used:
            raise ValueError("a search is under way, whose KV would be of other weights: end or cancel it first")
        self.token_steps.forget()
        self.id = f"{str(self.id).rpartition('#')[0]}#{next(_ids)}"
