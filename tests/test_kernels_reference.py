"""The ops as a library: gradients, memory, refusals, and what "auto" says it chose. No Triton needed here."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prm_search.triton_kernels import (
    Choice,
    _linear_autograd,
    choice,
    guide_logits,
    linear_logprob,
    reference,
    sample_rows,
    tree_attention,
    write_kv,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("chunked", [False, True], ids=["one-chunk", "chunked"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_logprob_gradcheck(monkeypatch, chunked, softcap, with_bias):
    if chunked:  # both passes in pieces: 300 entries are three chunks of at most 128
        monkeypatch.setattr(_linear_autograd, "_GRADIENT_BUDGET", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(reference, "_LOGIT_BUDGET", 1)
    vocabulary = 300 if chunked else 11
    operands = [randn(4, 5, dtype=torch.float64), randn(vocabulary, 5, seed=1, dtype=torch.float64)]
    if with_bias:
        operands.append(randn(vocabulary, seed=2, dtype=torch.float64))
    targets = torch.tensor([0, 3, vocabulary - 1, 3])

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, bias, softcap, 0.7, return_logsumexp=True)

    for operand in operands:
        operand.requires_grad_()
    assert torch.autograd.gradcheck(both, operands, fast_mode=chunked)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_only_the_gradients_asked_for_are_computed(needs):
    hidden, weight = randn(3, 4).requires_grad_(needs[0]), randn(9, 4, seed=1).requires_grad_(needs[1])
    linear_logprob(hidden, weight, torch.tensor([1, 2, 3])).sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == needs


def test_attention_and_guidance_have_torch_gradients():
    q, pool = randn(2, 2, 4, dtype=torch.float64), randn(5, 1, 4, seed=1, dtype=torch.float64)
    tables = {
        "slot_table": torch.tensor([[4, 0, 2]], dtype=torch.int32),
        "path_lens": torch.tensor([3], dtype=torch.int32),
        "q_starts": torch.tensor([0, 2], dtype=torch.int32),
    }
    attend = lambda q, k, v: tree_attention(q, k, v, **tables, scale=0.5)  # noqa: E731
    operands = [t.requires_grad_() for t in (q, pool, pool.detach().clone())]
    assert torch.autograd.gradcheck(attend, operands)
    logits = [randn(2, 6, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(lambda *rows: guide_logits(*rows, 0.7), logits)


# ----------------------------------------------------------------------------------------------------------- memory


class _Largest(TorchDispatchMode):
    """The most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor._base is None and not function.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_tokens_times_vocabulary_exists(monkeypatch, dtype):
    monkeypatch.setattr(reference, "_LOGIT_BUDGET", 1 << 14)
    monkeypatch.setattr(reference, "_WEIGHT_BUDGET", 1 << 14)
    monkeypatch.setattr(_linear_autograd, "_GRADIENT_BUDGET", {"cpu": 1 << 14})
    hidden, weight = randn(64, 8, dtype=dtype).requires_grad_(), randn(5000, 8, seed=1, dtype=dtype).requires_grad_()
    targets = torch.arange(64)
    with _Largest() as largest:
        logprob = linear_logprob(hidden, weight, targets)
        torch.autograd.grad(logprob.sum(), (hidden, weight))
    assert 0 < largest.elements <= 5000 * 8  # the weight's own gradient; [64, 5000] would be 320,000


def test_the_weights_gradient_is_written_in_its_place(monkeypatch):
    """A chunk at a time, in the weight's dtype: an fp32 product beside it would be twice its size on a large head."""
    monkeypatch.setattr(_linear_autograd, "_GRADIENT_BUDGET", {"cpu": 1 << 14})
    hidden, weight = randn(64, 8, dtype=torch.bfloat16), randn(5000, 8, seed=1, dtype=torch.bfloat16).requires_grad_()
    logprob = linear_logprob(hidden, weight, torch.arange(64))
    outs, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, out=None, **options: (outs.append(out), mm(*given, out=out))[1])
    (grad,) = torch.autograd.grad(logprob.sum(), weight)
    place = grad.untyped_storage().data_ptr()
    written = [out for out in outs if out is not None and out.untyped_storage().data_ptr() == place]
    assert sum(len(out) for out in written) == 5000
    assert {out.dtype for out in written} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------------------- refusals


def tables_of(rows: int = 1) -> dict[str, Tensor]:
    return {
        "slot_table": torch.zeros(rows, 4, dtype=torch.int32),
        "path_lens": torch.ones(rows, dtype=torch.int32),
        "q_starts": torch.arange(rows + 1, dtype=torch.int32),
    }


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 8), torch.zeros(5, 8), torch.zeros(2, dtype=torch.long)
Q, POOL, ROWS = torch.zeros(1, 2, 8), torch.zeros(4, 1, 8), torch.zeros(2, 5)
DRAWS = torch.full((2,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_logprob(HIDDEN[0], WEIGHT, TARGETS), r"hidden has shape \[8\]"),
        (lambda: linear_logprob(HIDDEN.long(), WEIGHT, TARGETS), "hidden is torch.int64"),
        (lambda: linear_logprob(HIDDEN, WEIGHT[:, :4], TARGETS), "need the same D"),
        (lambda: linear_logprob(HIDDEN, WEIGHT.half(), TARGETS), "weight torch.float16"),
        (lambda: linear_logprob(HIDDEN, WEIGHT[:0], TARGETS), "V and D must be at least 1"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS[:1]), r"targets has shape \[1\]"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS.float()), "targets is torch.float32"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS + 5), r"targets span \[5, 5\].*\[0, 5\)"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS - 1), r"targets span \[-1, -1\]"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, torch.zeros(4)), r"bias is \[4\]"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, softcap=0.0), "softcap is 0.0"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, scale=float("nan")), "scale is nan"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, scale=10**400), "scale is an integer beyond"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, softcap=10**400), "softcap is an integer beyond"),
        (lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, backend="cuda"), "backend is 'cuda'"),
        (lambda: guide_logits(ROWS, ROWS[:1], ROWS, 1.0), "prm is"),
        (lambda: guide_logits(ROWS, ROWS, ROWS, torch.ones(3)), r"alpha is \[3\]"),
        (lambda: guide_logits(ROWS, ROWS, ROWS, 1.0, out=ROWS.half()), "out is"),
        (lambda: sample_rows(ROWS[0], DRAWS), "logits has shape"),
        (lambda: sample_rows(ROWS[:, :0], DRAWS), "logits has 0 columns"),
        (lambda: sample_rows(ROWS, DRAWS.float()), "draws is .*float32"),
        (lambda: sample_rows(ROWS, DRAWS[:1]), r"draws is \[1\]"),
        (lambda: sample_rows(ROWS, DRAWS, -1.0), "temperature is -1.0"),
        (lambda: sample_rows(ROWS, DRAWS, torch.ones(9)), r"temperature is \[9\]"),
        (lambda: tree_attention(Q[0], POOL, POOL, **tables_of(), scale=1.0), "q has shape"),
        (lambda: tree_attention(Q, POOL[..., :4], POOL, **tables_of(), scale=1.0), "head dimensions must agree"),
        (lambda: tree_attention(Q, POOL, POOL[:2], **tables_of(), scale=1.0), "slots and KV heads must agree"),
        (lambda: tree_attention(Q, POOL.half(), POOL.half(), **tables_of(), scale=1.0), "they must agree"),
        (lambda: tree_attention(Q[:, [0, 0, 1]], *[POOL[:, [0, 0]]] * 2, **tables_of(), scale=1.0), "3 heads"),
        (lambda: tree_attention(Q, POOL, POOL, **tables_of(), scale=0.0), "scale is 0.0"),
        (lambda: tree_attention(Q, POOL, POOL, **tables_of(), scale=1.0, window=0), "window is 0"),
        (lambda: tree_attention(Q, POOL, POOL, **tables_of(), scale=1.0, sinks=torch.ones(3)), r"sinks is \[3\]"),
        (lambda: tree_attention(Q, POOL, POOL, **{**tables_of(), "path_lens": TARGETS}, scale=1.0), "path_lens has"),
        (lambda: tree_attention(Q, POOL, POOL, **{**tables_of(), "q_starts": TARGETS[:1]}, scale=1.0), "q_starts has"),
        (lambda: write_kv(POOL, POOL, Q, Q, TARGETS[:1]), r"k_new is \[1, 2, 8\]"),
        (lambda: write_kv(POOL, POOL, Q[:, :1], Q[:, :1], TARGETS), r"slots has shape \[2\]; \[1\]"),
        (lambda: choice(print, 1), "op is <built-in function print>"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="weight is list"):
        linear_logprob(HIDDEN, [[0.0]], TARGETS)
    with pytest.raises(TypeError, match="slots is list"):
        write_kv(POOL, POOL, Q[:, :1], Q[:, :1], [0])


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("wrong", ["", "1", True, [1.0], 1j, np.array("x")])
def test_what_is_not_a_number_is_a_type_error(name, wrong):
    with pytest.raises(TypeError, match=f"{name} is .*a finite number is needed, not"):
        linear_logprob(HIDDEN, WEIGHT, TARGETS, **{name: wrong})
    with pytest.raises(TypeError, match="scale is None"):
        choice(linear_logprob, HIDDEN, WEIGHT, TARGETS, scale=None)


# ----------------------------------------------------------------------------------------------------------- choice

CALLS = {
    linear_logprob: ((HIDDEN, WEIGHT, TARGETS), {}),
    guide_logits: ((ROWS, ROWS, ROWS, 1.0), {}),
    sample_rows: ((ROWS, DRAWS), {}),
    tree_attention: ((Q, POOL, POOL), {**tables_of(), "scale": 1.0}),
    write_kv: ((POOL, POOL, Q[:, :1], Q[:, :1], TARGETS[:1]), {}),
}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_choice_says_what_auto_takes_and_triton_never_falls_back(op):
    args, kwargs = CALLS[op]
    chosen = choice(op, *args, **kwargs)
    assert chosen.backend == "torch"
    assert "cpu" in chosen.reason or "triton" in chosen.reason
    assert choice(op, *args, **kwargs, backend="torch") == Choice("torch", "asked for")
    with pytest.raises(ValueError, match=f"{op.__name__}: backend='triton' is impossible"):
        op(*args, **kwargs, backend="triton")


def test_float64_stays_float64():
    assert linear_logprob(HIDDEN.double(), WEIGHT.double(), TARGETS).dtype == torch.float64
    with pytest.raises(ValueError, match="impossible"):
        linear_logprob(HIDDEN.double(), WEIGHT.double(), TARGETS, backend="triton")


def test_the_package_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None                      # what "not installed" looks like to import
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import torch
import prm_search.triton_kernels as k
h, w, t = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)
assert torch.allclose(k.linear_logprob(h, w, t), -torch.log(torch.tensor(3.0)))
assert k.choice(k.linear_logprob, h, w, t).reason.startswith("triton is not installed")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_no_triton():
    code = "import sys, prm_search.triton_kernels; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
