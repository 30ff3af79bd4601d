"""Cases of the ops around the lm_head: linear_logprob, guide_logits and sample_rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Absent, Case, Way, bound, compiled
from common import Machine
from torch import Tensor
from torch.nn import functional

from prm_search.triton_kernels import choice, guide_logits, linear_logprob, sample_rows

CHECKED = 64  # rows compared with float64
CHUNK = 1024  # rows of the two-kernel path at once, as vLLM does


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return what transformers users write: logits in the operands' dtype, widened, log_softmax, gather."""
    logits = hidden @ weight.t()
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def two_kernels(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits by the library's matmul, CHUNK rows at a time, then one pass over them (plain torch on a CPU)."""
    parts = []
    for rows, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = rows @ weight.t()
        if logits.is_cuda:
            from gather_kernel import gather_logprob

            parts.append(gather_logprob(logits, ids))
        else:
            parts.append(logits.gather(1, ids[:, None])[:, 0].float() - logits.float().logsumexp(-1))
    return torch.cat(parts)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """float64 of the first CHECKED rows, from the same operands."""
    logits = hidden[:CHECKED].double() @ weight.double().t()
    return torch.log_softmax(logits, -1).gather(1, targets[:CHECKED, None])[:, 0]


def _theirs(module: str, name: str, use: Callable[[Any], Way]) -> Way | Absent:
    """A rival from a library that may not be here."""
    try:
        return use(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, RuntimeError) as problem:
        return Absent(f"no {name} in {module.partition('.')[0]} here: {type(problem).__name__}")


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, op: Callable[..., Any]) -> Tensor:
    loss = op(hidden, weight, targets, reduction="none")
    return -(loss[0] if isinstance(loss, tuple) else loss)


def _torch_op(hidden: Tensor, weight: Tensor, targets: Tensor, options: Any) -> Tensor:
    return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options())


def head(machine: Machine, rows: int, depth: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets whose logits have a standard deviation of 4: the largest is about 20, as a model's."""
    draw = torch.Generator(machine.device).manual_seed(seed)
    weight = torch.empty(vocabulary, depth, dtype=machine.dtype, device=machine.device)
    weight.normal_(std=4 * depth**-0.5, generator=draw)
    hidden = torch.randn(rows, depth, generator=draw, device=machine.device).to(machine.dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=draw, device=machine.device)


def logprob_case(machine: Machine, rows: int, depth: int, vocabulary: int, quick: bool) -> Case:
    """linear_logprob; `matmul` is the product alone, logits written: the yardstick of its rate."""
    operands = hidden, weight, targets = head(machine, rows, depth, vocabulary)
    ways: dict[str, Way | Absent] = {
        "ours": bound(linear_logprob, *operands),
        "matmul": lambda: hidden @ weight.t(),
        "eager": bound(eager, *operands),
        "two_kernels": bound(two_kernels, *operands),
        "compiled_eager": compiled(eager, *operands, skip=quick and machine.device == "cpu"),
        "torch_op": _theirs("torch.nn", "LinearCrossEntropyOptions", lambda o: bound(_torch_op, *operands, o)),
        "trl": _theirs(
            "trl.trainer.utils", "selective_log_softmax", lambda op: lambda: op(hidden @ weight.t(), targets)
        ),
        "liger": _theirs(
            "liger_kernel.transformers.functional",
            "liger_fused_linear_cross_entropy",
            lambda op: bound(_liger, *operands, op),
        ),
    }
    return Case(
        "linear_logprob",
        {"N": rows, "D": depth, "V": vocabulary},
        ways,
        choice(linear_logprob, *operands),
        exact=bound(exact, *operands),
        checked=lambda result: result[:CHECKED],
        flop=2.0 * rows * depth * vocabulary,
        size=hidden.element_size() * depth * (vocabulary + rows),
        unlike=("matmul",),
    )


def _guided(policy: Tensor, prm: Tensor, ref: Tensor, alpha: Tensor) -> Tensor:
    ratio = torch.log_softmax(prm.float(), -1) - torch.log_softmax(ref.float(), -1)
    return (policy.float() + alpha[:, None] * ratio).to(policy.dtype)


def _guided_exactly(policy: Tensor, prm: Tensor, ref: Tensor, alpha: Tensor) -> Tensor:
    ratio = torch.log_softmax(prm.double(), -1) - torch.log_softmax(ref.double(), -1)
    return policy.double() + alpha.double()[:, None] * ratio


def guide_case(machine: Machine, rows: int, vocabulary: int, quick: bool) -> Case:
    """guide_logits. In bf16 every way has the error of rounding its result once."""
    draw = torch.Generator(machine.device).manual_seed(0)
    policy, prm, ref = (
        (4 * torch.randn(rows, vocabulary, generator=draw, device=machine.device)).to(machine.dtype) for _ in range(3)
    )
    alpha = torch.rand(rows, generator=draw, device=machine.device) + 0.5
    operands = (policy, prm, ref, alpha)
    return Case(
        "guide_logits",
        {"B": rows, "V": vocabulary},
        {
            "ours": bound(guide_logits, *operands),
            "eager": bound(_guided, *operands),
            "compiled_eager": compiled(_guided, *operands, skip=quick and machine.device == "cpu"),
        },
        choice(guide_logits, *operands),
        exact=bound(_guided_exactly, *operands),
        flop=0.0,
        size=4.0 * rows * vocabulary * policy.element_size(),
    )


def _drawn(logits: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the tokens at which one running sum over the vocabulary exceeds the uniform numbers."""
    logprobs = torch.log_softmax(logits.to(dtype), -1)
    sums = logprobs.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    return logprobs.gather(1, tokens)[:, 0]


def _multinomial(logits: Tensor) -> Tensor:
    """The way of transformers' generate, which draws other tokens and knows no log-probability of them."""
    return torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]


def sample_case(machine: Machine, rows: int, vocabulary: int) -> Case:
    """sample_rows: the drawn tokens' log-probabilities; the uniform numbers are given to all."""
    draw = torch.Generator(machine.device).manual_seed(0)
    logits = 4 * torch.randn(rows, vocabulary, generator=draw, device=machine.device)
    uniform = torch.rand(rows, generator=draw, device=machine.device, dtype=torch.float64)
    return Case(
        "sample_rows",
        {"B": rows, "V": vocabulary},
        {
            "ours": lambda: sample_rows(logits, uniform).logprobs,
            "eager": bound(_drawn, logits, uniform, torch.float32),
            "multinomial": bound(_multinomial, logits),
        },
        choice(sample_rows, logits, uniform),
        exact=bound(_drawn, logits, uniform, torch.float64),
        flop=0.0,
        size=1.0 * rows * vocabulary * logits.element_size(),
        unlike=("multinomial",),
    )


def cases(machine: Machine, quick: bool) -> Iterator[Case]:
    """Sizes of Qwen2.5-7B's and Llama-3.1-8B's kind on a GPU, small ones on a CPU."""
    if quick:
        few, heads, widths = [32], [(128, 2003)], [(4, 2003)]
    elif machine.device == "cpu":
        few, heads, widths = [1, 16, 64, 256], [(576, 49152)], [(1, 49152), (16, 49152)]
    else:
        few, heads = [64, 512, 2048, 16384], [(3584, 152064), (4096, 131072)]
        widths = [(1, 152064), (16, 152064), (64, 152064)]
    for depth, vocabulary in heads:
        yield from (logprob_case(machine, rows, depth, vocabulary, quick) for rows in few)
    yield from (guide_case(machine, rows, vocabulary, quick) for rows, vocabulary in widths)
    yield from (sample_case(machine, rows, vocabulary) for rows, vocabulary in [*widths, (256, widths[-1][1])])
