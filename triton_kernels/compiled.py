"""The Triton paths as opaque torch operators, which torch.compile puts in its graph instead of tracing the launches.

Used only while compiling: eager calls launch directly and pay nothing for the dispatcher. Each operator runs the very
function that eager runs; the fakes state shape and dtype of its result.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from prm_search.triton_kernels import _attention_launch, _linear_launch, _rows_launch
from prm_search.triton_kernels.calls import AttentionCall, HeadCall, SharedPrefix

# ruff: noqa: UP045 (torch's schema inference wants typing.Optional)


@torch.library.custom_op("prm_search::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Optional[Tensor], softcap: Optional[float], scale: float
) -> tuple[Tensor, Tensor]:
    return _linear_launch.forward(HeadCall(hidden, weight, targets, bias, softcap, scale))


@linear_logprob.register_fake
def _(hidden, *others):  # type: ignore[no-untyped-def]
    logprob = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return logprob, torch.empty_like(logprob)


@torch.library.custom_op("prm_search::logit_gradient", mutates_args=())
def logit_gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Optional[Tensor], softcap: Optional[float], scale: float,
    logsumexp: Tensor, grad_logprob: Tensor, grad_logsumexp: Tensor, first: int,
) -> Tensor:  # fmt: skip
    part = HeadCall(hidden, weight, targets, bias, softcap, scale)
    return _linear_launch.logit_gradient(part, logsumexp, grad_logprob, grad_logsumexp, first)


@logit_gradient.register_fake
def _(hidden, weight, *others):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


@torch.library.custom_op("prm_search::tree_attention", mutates_args=())
def tree_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, slot_table: Tensor, path_lens: Tensor, q_starts: Tensor, scale: float,
    softcap: Optional[float], window: Optional[int], sinks: Optional[Tensor], max_new: Optional[int],
    max_path: Optional[int], group_rows: Optional[Tensor], lengths: Optional[Tensor], max_group_tokens: int,
    max_length: int,
) -> Tensor:  # fmt: skip
    prefix = None
    if group_rows is not None and lengths is not None:
        prefix = SharedPrefix(group_rows, lengths, max_group_tokens, max_length)
    return _attention_launch.forward(
        AttentionCall(
            q, k_pool, v_pool, slot_table, path_lens, q_starts, scale, softcap, window, sinks, max_new, max_path, prefix
        )
    )


@tree_attention.register_fake
def _(q, k_pool, v_pool, *others):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:2], v_pool.shape[2])


@torch.library.custom_op("prm_search::write_kv", mutates_args=("k_pool", "v_pool"))
def write_kv(k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, slots: Tensor) -> None:
    _attention_launch.copy_kv(k_pool, v_pool, k_new, v_new, slots)


@torch.library.custom_op("prm_search::guide_logits", mutates_args=())
def guide_logits(policy_logits: Tensor, prm: Tensor, reference_logits: Tensor, alpha: Tensor) -> Tensor:
    return _rows_launch.guide_logits(policy_logits, prm, reference_logits, alpha)


@guide_logits.register_fake
def _(policy_logits, prm, reference_logits, alpha):  # type: ignore[no-untyped-def]
    return torch.empty_like(policy_logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("prm_search::sample_rows", mutates_args=())
def sample_rows(logits: Tensor, draws: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, logprobs, tops = _rows_launch.sample_rows(logits, draws, temperature)
    return tokens, logprobs.clone(), tops.clone()  # views of one tensor: an operator's results share no memory


@sample_rows.register_fake
def _(logits, draws, temperature):  # type: ignore[no-untyped-def]
    number = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return torch.empty_like(number, dtype=torch.int64), number, torch.empty_like(number)
