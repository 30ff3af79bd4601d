"""Log-probabilities of response tokens with gradients and without a `[tokens, vocabulary]` tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.head import Head
from .data import Item, LabelledResponse, collate


@contextmanager
def response_forward(module: Any) -> Iterator[None]:
    """Within this context `module.forward` gives log-probabilities of response tokens.

        forward(input_ids, attention_mask, response_mask) -> [R, L - 1] fp32, nats; 0 where response_mask is False

    It is the module's own forward that changes, so that wrappers (PEFT, DDP, autocast) do what they do to any forward.
    The head runs on the response's rows alone, through `linear_logprob`, outside autocast.

    Args:
        module: a transformers causal LM, not wrapped.

    Raises:
        ValueError: its head is not one that we know how to apply (see check_head), or there is none.
    """
    head = Head(module)
    check_head(module, head)

    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, **others: object
    ) -> Tensor:
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        rows = hidden[:, :-1][response_mask].to(head.linear.weight.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            found = head.logprobs(rows, input_ids[:, 1:][response_mask])
        return found.new_zeros(response_mask.shape).masked_scatter(response_mask, found)

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
    own = module(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
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


@torch.no_grad()
def row_logprobs(
    module: Any, rows: Sequence[LabelledResponse], *, bf16: bool = False, batch_tokens: int = 1 << 14
) -> list[np.ndarray]:
    """log p of each row's response tokens under a model within `response_forward`, as it is evaluated in training.

    Args:
        module: the model, or its wrapper.
        rows: any.
        bf16: under autocast.
        batch_tokens: of one padded forward, at most (a longer row makes one by itself).

    Returns:
        [len(response_ids)] fp32 a row, nats.
    """
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    device = next(module.parameters()).device
    training = module.training
    module.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(rows[order[count]]) <= batch_tokens:
            count += 1
        chosen, order = order[:count], order[count:]
        batch = collate([Item((rows[i],), rows[i].label) for i in chosen])
        names = ("input_ids", "attention_mask", "response_mask")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            values = module(**{name: batch[name].to(device) for name in names})
        for i, line, mask in zip(chosen, values.float().cpu(), batch["response_mask"], strict=True):
            found[i] = line[mask].numpy()
    module.train(training)
    return found


def add_reference(
    module: Any, rows: Sequence[LabelledResponse], identity: object, folder: Path, *, bf16: bool = False
) -> bool:
    """Fill in `LabelledResponse.reference`: from a file, or by one pass of the model, whose result is filed.

    Args:
        module: the untrained model, within `response_forward`.
        rows: any.
        identity: says which weights these are; plain values.
        folder: where the file is, or will be: `reference-<digest of rows and identity>.safetensors`.
        bf16: see row_logprobs.

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
        values = row_logprobs(module, rows, bf16=bf16)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"logprobs": np.concatenate(values)}, part)
        os.replace(part, path)  # whole or not at all
    for row, value in zip(rows, values, strict=True):
        row.reference = value
    return known
