"""Log-probabilities of response tokens with gradients and without a `[tokens, vocabulary]` tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.head import Head
from ..triton_kernels.reference import log_softmax
from .data import Item, LabelledResponse, collate
from .packing import Pack, collate_packs, packs

# What `response_forward` takes of a batch.
FORWARD = ("input_ids", "attention_mask", "response_mask", "position_ids", "sources", "targets", "places")


@contextmanager
def response_forward(module: Any) -> Iterator[None]:
    """Within this context `module.forward` gives log-probabilities of response tokens.

        forward(input_ids, attention_mask, response_mask) -> [R, L - 1] fp32, nats; 0 where response_mask is False

    A batch of `packing.collate_packs` gives the same of its rows, [R, S].

    The module's own forward changes, so that wrappers (PEFT, DDP, autocast) do what they do to any forward. The head
    runs on the response's rows alone, through `linear_logprob`, outside autocast.

    Args:
        module: a transformers causal LM, not wrapped.

    Raises:
        ValueError: the module has no head, or one that we do not know how to apply (see check_head).
    """
    head = Head(module)
    check_head(module, head)

    def forward(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        sources: Tensor | None = None,
        targets: Tensor | None = None,
        places: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        packed = {} if position_ids is None else {"position_ids": position_ids}
        if packed and self.config._attn_implementation == "eager":  # which adds its mask to the scores
            low = torch.finfo(torch.float32).min
            attention_mask = torch.zeros_like(attention_mask, dtype=torch.float32).masked_fill(~attention_mask, low)
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed)[0]
        if sources is None or targets is None:
            rows, targets = hidden[:, :-1][response_mask], input_ids[:, 1:][response_mask]
        else:
            rows = hidden.flatten(0, 1)[sources]
        rows, kind = rows.to(head.linear.weight.dtype), rows.device.type
        # Under autocast the head's operands are narrow as any other layer's are, for the tensor cores. Sums stay fp32.
        operands = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):
            logprobs = head.logprobs(rows, targets, operands)
        if places is not None:
            logprobs = logprobs[places]
        return logprobs.new_zeros(response_mask.shape).masked_scatter(response_mask, logprobs)

    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        module.__dict__.pop("_original_forward", None)  # accelerate's
        del module.forward


@torch.no_grad()
def check_head(module: Any, head: Head) -> None:
    """Compare our reading of a model's head with its own forward on a few tokens.

    Raises:
        ValueError: they differ: the model does something to its logits that is not known here.
    """
    training = module.training
    module.eval()
    ids = (torch.arange(8, device=module.get_input_embeddings().weight.device) * 7 % head.vocab)[None]
    own = log_softmax(module(input_ids=ids, use_cache=False).logits.float())[0, :-1]
    hidden = module.base_model(input_ids=ids, use_cache=False)[0][0, :-1]
    ours = head.logprobs(hidden.to(head.linear.weight.dtype), ids[0, 1:])
    module.train(training)
    gap = (own.gather(1, ids[0, 1:, None])[:, 0] - ours).abs().max().item()
    if not gap < (1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.5):
        raise ValueError(f"{type(module).__name__}: its log-probabilities differ from its head's by {gap:.3g} nats")


def without_dropout(module: nn.Module) -> None:
    """Take dropout out of a model for good: its noise would be part of every log-ratio."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def freeze(module: Any, layers: int) -> None:
    """Take the embeddings and the lowest layers out of training; a head that is tied to the embeddings goes with them.

    Args:
        module: a transformers causal LM; PEFT's layers may be in it already.
        layers: how many; 0 changes nothing, the embeddings included.

    Raises:
        ValueError: the model has no list of layers, or not more than so many.
    """
    if not layers:
        return
    depth = module.config.get_text_config().num_hidden_layers
    stacks = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if not stacks or layers >= depth:
        reason = f"has {depth}, of which at least one is trained" if stacks else "has no list of layers"
        raise ValueError(f"freeze_layers={layers}: {type(module).__name__} {reason}")
    embeddings = [part for part in module.base_model.modules() if isinstance(part, nn.Embedding)]
    for part in [*embeddings, *(layer for stack in stacks for layer in stack[:layers])]:
        part.requires_grad_(False)


@torch.no_grad()
def row_logprobs(
    module: Any,
    rows: Sequence[LabelledResponse],
    *,
    bf16: bool = False,
    batch_tokens: int = 1 << 14,
    pack: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[np.ndarray]:
    """log p of each row's response tokens under a model within `response_forward`, as it is evaluated in training.

    Args:
        module: the model, or its wrapper.
        rows: any.
        bf16: under autocast.
        batch_tokens: of one padded forward, at most (a longer row makes one by itself).
        pack: tokens of a pack, at most; None: every row is computed by itself.
        progress: called after each forward with the tokens that are done, and all.

    Returns:
        [len(response_ids)] fp32 a row, nats.
    """
    items = [Item((row,), row.label) for row in rows]
    places = {id(item): index for index, item in enumerate(items)}
    logprobs: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    device = next(module.parameters()).device
    training = module.training
    module.eval()
    units: list[Any] = sorted(packs(items, pack) if pack else items, key=lambda unit: _tokens(unit))
    tokens, whole = 0, sum(map(_tokens, units))
    while units:
        count = 1
        while count < len(units) and (count + 1) * _tokens(units[count]) <= batch_tokens:
            count += 1
        chosen, units = units[:count], units[count:]
        batch = collate_packs(chosen) if pack else collate(chosen)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            values = module(**{name: batch[name].to(device) for name in FORWARD if name in batch})
        of_rows = [item for unit in chosen for item in unit.items] if pack else chosen
        for item, line, mask in zip(of_rows, values.float().cpu(), batch["response_mask"], strict=True):
            logprobs[places[id(item)]] = line[mask].numpy()
        tokens += sum(map(_tokens, chosen))
        if progress is not None:
            progress(tokens, whole)
    module.train(training)
    return logprobs


def _tokens(unit: Pack | Item) -> int:
    return len(unit) if isinstance(unit, Pack) else len(unit.rows[0])


def check_packs(module: Any, made: Sequence[Pack]) -> None:
    """Compare the longest row of the packs, as its pack has it, with that row by itself.

    Args:
        module: within `response_forward`.
        made: at least one.

    Raises:
        ValueError: they differ, so the model's attention is not that of a mask and positions alone (ALiBi, recurrent
            layers, a window shorter than the row).
    """
    if module.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"pack: attn_implementation={module.config._attn_implementation!r} takes no mask; it is sdpa or eager"
        )
    pack, item = max(((pack, item) for pack in made for item in pack.items), key=lambda entry: len(entry[1].rows[0]))
    others = [other.rows[0] for other in pack.items if other is not item][:7]
    rows = [*others, item.rows[0]]  # the longest one last: away from its prompt
    whole = sum(map(len, rows))
    packed, alone = row_logprobs(module, rows, pack=whole), row_logprobs(module, rows)
    gap = max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(packed, alone, strict=True))
    if not gap < 1e-3:
        raise ValueError(
            f"pack: {type(module).__name__} gives log-probabilities that differ by {gap:.3g} nats where responses are "
            "behind one prompt; train without pack"
        )


def sampled_reference(module: Any, rows: Sequence[LabelledResponse], *, bf16: bool = False) -> None:
    """Fill in `LabelledResponse.reference` with what the rollouts say of the policy that sampled them.

    Args:
        module: that policy, within `response_forward`.
        rows: at least one.
        bf16: see row_logprobs.

    Raises:
        ValueError: a row has no log-probabilities, or those of the eight longest rows differ from the module's by a
            mean of more than 0.1 nat a token.
    """
    lacking = sum(row.logprobs is None for row in rows)
    if lacking:
        raise ValueError(f"sampled_reference: {lacking} of {len(rows)} rollouts have no logprobs; sample them again")
    some = sorted(rows, key=len)[-8:]
    computed = np.concatenate(row_logprobs(module, some, bf16=bf16))
    gap = np.abs(computed - np.concatenate([row.logprobs for row in some if row.logprobs is not None])).mean()
    if not gap < 0.1:
        raise ValueError(
            f"sampled_reference: the log-probabilities in the rollouts differ from the model's by {gap:.2g} nats a "
            "token: another model, or another state of it, sampled them"
        )
    for row in rows:
        row.reference = row.logprobs


def add_reference(
    module: Any,
    rows: Sequence[LabelledResponse],
    identity: object,
    folder: Path,
    *,
    bf16: bool = False,
    pack: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> bool:
    """Fill in `LabelledResponse.reference`: from a file, or by one pass of the model, whose result is filed.

    Args:
        module: the untrained model, within `response_forward`.
        rows: any.
        identity: says which weights these are; plain values.
        folder: where the file is, or will be: `reference-<digest of rows and identity>.safetensors`.
        bf16, pack, progress: see row_logprobs.

    Returns:
        Whether they were known.
    """
    from safetensors.numpy import load_file, save_file

    digest = blake2b(json.dumps([identity, bf16]).encode(), digest_size=8)
    for row in rows:
        digest.update(np.array([len(row.prompt_ids), *row.prompt_ids, len(row.response_ids)], np.int32).tobytes())
        digest.update(row.response_ids.tobytes())
    path = folder / f"reference-{digest.hexdigest()}.safetensors"
    known = path.is_file()
    if known:
        flat = load_file(path)["logprobs"]
        ends = np.cumsum([len(row.response_ids) for row in rows])
        values: Sequence[np.ndarray] = np.split(flat, ends[:-1])
    else:
        values = row_logprobs(module, rows, bf16=bf16, pack=pack, progress=progress)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"logprobs": np.concatenate(values)}, part)
        os.replace(part, path)  # whole or not at all
    for row, value in zip(rows, values, strict=True):
        row.reference = value
    return known
