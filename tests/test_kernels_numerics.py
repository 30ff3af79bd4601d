"""Every op against a float64 oracle written here, and against the same op done eagerly in the operands' own dtype.

Three runs of the same file: plain `pytest` checks the torch backend on the CPU; `pytest -m gpu` checks both backends on
a GPU; with TRITON_INTERPRET=1 (test_kernels_interpreter.py starts that process) the Triton kernels run in the
interpreter, where bfloat16 is known to be wrong and is left out. The bar is the same everywhere: the root-mean-square
error is at most eager's plus 1e-6.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from prm_search.rng import counters_of, uniforms
from prm_search.triton_kernels import (
    SharedPrefix,
    guide_logits,
    linear_logprob,
    sample_rows,
    tiles,
    tree_attention,
    write_kv,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RUNS = (
    [pytest.param(("cpu", "triton"), id="interpreter")]
    if INTERPRETED
    else [
        pytest.param(("cpu", "torch"), id="cpu"),
        pytest.param(("cuda", "torch"), id="cuda-torch", marks=GPU),
        pytest.param(("cuda", "triton"), id="cuda-triton", marks=GPU),
    ]
)
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def no_worse(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert rms(ours - truth) <= rms(eager - truth) + 1e-6


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


# ----------------------------------------------------------------------------------------------------- linear ops


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    logits = head_logits(hidden, weight, *args)  # in the operands' dtype, as a model's forward pass gives them
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, targets.long()[:, None])[:, 0], logits.logsumexp(-1)


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


# (N, D, V): one row; a width that no descriptor takes; a vocabulary of one entry; widths that no tile divides.
SHAPES = [(1, 48, 203), (5, 33, 97), (3, 16, 1), (37, 72, 301), (70, 40, 130)]
# (bias, softcap, scale, shift of every logit)
HEADS = [
    (False, None, 1.0, 0.0),
    (True, 6.0, 0.7, 0.0),
    (True, None, 1.0, 8.0),
    (True, None, 1.0, -8.0),
    (True, None, 1.0, -300.0),
    (False, None, -0.8, 0.0),
    (False, None, 2.5, 0.0),
]
KINDS = ["plain", "bias-cap-scale", "shift+8", "shift-8", "shift-300", "scale<0", "scale>1"]


def head(
    shape: tuple[int, int, int],
    kind: tuple[bool, float | None, float, float],
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None, float]:
    (rows, depth, vocabulary), (has_bias, softcap, scale, shift) = shape, kind
    hidden = normal(rows, depth, seed=seed, dtype=dtype, device=device)
    weight = normal(vocabulary, depth, seed=seed + 1, dtype=dtype, device=device) * (3.0 * depth**-0.5)
    bias = normal(vocabulary, seed=seed + 2, dtype=dtype, device=device) + shift if has_bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
    return hidden, weight, targets, bias, softcap, scale


@pytest.mark.parametrize(
    "kind", HEADS, ids=["plain", "bias-cap-scale", "shift+8", "shift-8", "shift-300", "scale<0", "scale>1"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_logprob_is_no_worse_than_eager(run, dtype, shape, kind):
    device, backend = run
    hidden, weight, targets, bias, softcap, scale = head(shape, kind, dtype, device, seed=1)
    logprob, logsumexp = linear_logprob(
        hidden, weight, targets.int(), bias, softcap, scale, return_logsumexp=True, backend=backend
    )
    assert logprob.dtype == logsumexp.dtype == torch.float32
    h, w, b = doubled(hidden, weight, bias)
    true_logprob, true_logsumexp = head_logprob(h, w, targets, b, softcap, scale)
    eager_logprob, eager_logsumexp = head_logprob(hidden, weight, targets, bias, softcap, scale)
    no_worse(logprob, eager_logprob, true_logprob)
    no_worse(logsumexp, eager_logsumexp, true_logsumexp)
    if abs(kind[3]) < 100:  # the promise for half operands: fp32 accumulation, not just "no worse than eager"
        torch.testing.assert_close(logprob.double(), true_logprob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["misaligned", "strided rows", "transposed hidden", "wide weight"])
def test_linear_logprob_takes_every_layout(run, dtype, form):
    device, backend = run
    hidden, weight, targets, *_ = head((9, 64, 150), HEADS[0], dtype, device, seed=3)
    plain = linear_logprob(hidden, weight, targets, backend=backend)
    if form == "misaligned":  # a base address that no TMA descriptor takes, with a depth that tiles evenly
        hidden = torch.cat([hidden.new_zeros(1), hidden.flatten()])[1:].view_as(hidden)
    elif form == "strided rows":
        hidden = torch.cat([hidden, hidden], dim=1)[:, : hidden.shape[1]]
    elif form == "transposed hidden":
        hidden = hidden.T.contiguous().T
    else:
        weight = torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
    torch.testing.assert_close(linear_logprob(hidden, weight, targets, backend=backend), plain, rtol=1e-5, atol=1e-5)


def test_linear_logprob_of_no_rows(run, dtype):
    device, backend = run
    hidden, weight = torch.zeros(0, 16, dtype=dtype, device=device), torch.zeros(7, 16, dtype=dtype, device=device)
    hidden.requires_grad_()
    targets = torch.zeros(0, dtype=torch.long, device=device)
    logprob, logsumexp = linear_logprob(hidden, weight, targets, return_logsumexp=True, backend=backend)
    assert logprob.shape == logsumexp.shape == (0,)
    assert torch.autograd.grad(logprob.sum(), hidden)[0].shape == (0, 16)


def test_masked_vocabulary_entries_get_no_probability(run, dtype):
    device, backend = run
    hidden, weight, targets, _, _, _ = head((4, 32, 100), HEADS[0], dtype, device, seed=5)
    bias = torch.zeros(100, device=device, dtype=dtype)
    bias[40:] = -torch.inf  # whole tiles of it
    targets = targets % 40
    h, w = doubled(hidden, weight[:40])
    truth, _ = head_logprob(h, w, targets, None, None, 1.0)
    logprob = linear_logprob(hidden, weight, targets, bias, backend=backend)
    torch.testing.assert_close(logprob.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS[:2], ids=["plain", "bias-cap-scale"])
@pytest.mark.parametrize("shape", [(5, 33, 97), (37, 72, 301)], ids=str)
def test_gradients_are_no_worse_than_eager(run, dtype, shape, kind):
    device, backend = run
    hidden, weight, targets, bias, softcap, scale = head(shape, kind, dtype, device, seed=7)
    upstream = normal(2, shape[0], seed=8, device=device)

    def gradients(function, operands: list[Tensor]) -> tuple[Tensor, ...]:
        operands = [operand.detach().requires_grad_() for operand in operands]
        logprob, logsumexp = function(*operands[:2], targets, *(operands[2:] or [None]), softcap, scale)
        total = (logprob * upstream[0].to(logprob.dtype) + logsumexp * upstream[1].to(logprob.dtype)).sum()
        return torch.autograd.grad(total, operands)

    def fused(*args: object) -> tuple[Tensor, Tensor]:
        return linear_logprob(*args, return_logsumexp=True, backend=backend)

    operands = [t for t in (hidden, weight, bias) if t is not None]
    ours, eager = gradients(fused, operands), gradients(head_logprob, operands)
    truth = gradients(head_logprob, [operand.double() for operand in operands])
    for operand, mine, theirs, exact in zip(operands, ours, eager, truth, strict=True):
        assert mine.dtype == operand.dtype
        assert mine.shape == operand.shape
        no_worse(mine, theirs, exact)


@pytest.mark.skipif(not INTERPRETED, reason="the tile is chosen by the card; the interpreter can be given any")
@pytest.mark.parametrize("kind", HEADS[:2], ids=["plain", "bias-cap-scale"])
@pytest.mark.parametrize("depth", [64, 50], ids=["descriptors", "pointers"])
def test_the_wide_tile_folds_its_halves_in_order(monkeypatch, depth, kind):
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.MatmulTile(16, 256, 32, stages=1, warps=1))
    hidden, weight, targets, bias, softcap, scale = head((5, depth, 700), kind, torch.float32, "cpu", seed=15)
    logprob = linear_logprob(hidden, weight, targets, bias, softcap, scale, backend="triton")
    truth, _ = head_logprob(*doubled(hidden, weight), targets, *doubled(bias), softcap, scale)
    torch.testing.assert_close(logprob.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="the range is then checked on the host")
def test_a_target_outside_the_vocabulary_is_nan_on_a_gpu(run):
    device, backend = run
    if device == "cpu":
        pytest.skip("CPU targets are checked: test_kernels_reference.py")
    hidden, weight = normal(3, 16, seed=1, device=device), normal(10, 16, seed=2, device=device)
    logprob = linear_logprob(hidden, weight, torch.tensor([0, 10, -1], device=device), backend=backend)
    assert logprob.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 513])
@pytest.mark.parametrize("kind", HEADS[:2], ids=["plain", "bias-cap-scale"])
def test_linear_logprob_at_model_size(rows, kind):
    hidden, weight, targets, bias, softcap, scale = head((rows, 896, 151_936), kind, torch.bfloat16, "cuda", seed=17)
    logprob = linear_logprob(hidden, weight, targets, bias, softcap, scale, backend="triton")
    h, w, b = doubled(hidden, weight, bias)
    truth, _ = head_logprob(h, w, targets, b, softcap, scale)
    torch.testing.assert_close(logprob.double(), truth, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- row-wise ops


@pytest.mark.parametrize("widths", [(203, 203, 203), (2500, 2600, 2550), (300, 200, 250)], ids=str)
def test_guide_logits_is_no_worse_than_eager(run, dtype, widths):
    device, backend = run
    policy, prm, ref = (normal(4, width, seed=31 + i, dtype=dtype, device=device) * 5 for i, width in enumerate(widths))
    alpha = torch.tensor([1.0, 0.5, -2.0, 0.0], device=device)
    steered = guide_logits(policy, prm, ref, alpha, backend=backend)
    assert steered.dtype == dtype
    shared = min(widths)

    def formula(policy: Tensor, prm: Tensor, ref: Tensor) -> Tensor:
        ratio = prm.log_softmax(-1)[:, :shared] - ref.log_softmax(-1)[:, :shared]
        return policy[:, :shared] + alpha[:, None].to(policy.dtype) * ratio

    no_worse(steered[:, :shared], formula(policy, prm, ref), formula(*doubled(policy, prm, ref)))
    assert torch.equal(steered[:, shared:], policy[:, shared:])
    assert torch.equal(steered[3], policy[3])


def test_guide_logits_leaves_alone_what_has_no_ratio(run):
    device, backend = run
    policy, prm, ref = (normal(4, 50, seed=41 + i, device=device) for i in range(3))
    policy[0] = -torch.inf
    policy[1, 3], prm[1, 4], ref[1, 5] = -torch.inf, -torch.inf, -torch.inf
    prm[2] = torch.nan
    before = policy.clone()
    alpha = torch.tensor([1.0, 1.0, 0.0, 1.0], device=device)
    steered = guide_logits(policy, prm, ref, alpha, backend=backend)
    assert torch.equal(steered[0], before[0])
    assert torch.equal(steered[1, 3:6], before[1, 3:6])
    assert torch.equal(steered[2], before[2])
    assert not torch.equal(steered[1, 6:], before[1, 6:])
    assert not steered.isnan().any()
    assert torch.equal(guide_logits(policy, prm, ref, alpha, out=policy, backend=backend), steered)
    assert torch.equal(policy, steered)


# ------------------------------------------------------------------------------------------------------- sampling


def one_running_sum(logits: Tensor, uniform: Tensor, temperature: Tensor) -> list[int]:
    """The tokens, from one running sum over the vocabulary in float64."""
    tokens = []
    for row, u, heat in zip(logits.double().cpu(), uniform.tolist(), temperature.tolist(), strict=True):
        if heat == 0:
            tokens.append(int(row.argmax()))
        else:
            sums = (row / heat).softmax(-1).cumsum(-1).numpy()
            tokens.append(int(np.searchsorted(sums, u * sums[-1], side="right")))
    return tokens


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 1100, 5003])
def test_sample_rows_draws_what_one_running_sum_draws(run, dtype, vocabulary):
    device, backend = run
    rows = 4 if INTERPRETED else 60
    logits = 3 * normal(rows, vocabulary, seed=vocabulary, dtype=dtype, device=device)
    logits[:, 1::3] = -torch.inf
    logits[0] -= 300
    heat = torch.tensor([1.0, 0.0, 0.5, 3.0]).repeat(rows // 4)
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = logits.clone()
    drawn = sample_rows(logits, uniform.to(device), heat.to(device), backend=backend)
    assert torch.equal(logits, before)
    assert drawn.tokens.tolist() == one_running_sum(logits, uniform, heat)
    truth = logits.double().log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs.double(), truth.gather(1, drawn.tokens[:, None])[:, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(drawn.top_logprobs.double(), truth.max(-1).values, rtol=0, atol=2e-6)


def test_sample_rows_takes_counters_for_numbers(run):
    """The kernel's Philox is prm_search.rng's, to the last bit: signs, 64-bit lineages and all."""
    device, backend = run
    draw = np.random.default_rng(0)
    n = 8 if INTERPRETED else 40
    seeds, streams, lineages = ([0, 1, *draw.integers(0, 2**64, n - 2, dtype=np.uint64).tolist()] for _ in range(3))
    positions = [0, 1, *draw.integers(0, 2**31, n - 2).tolist()]
    wanted = torch.from_numpy(uniforms(seeds, streams, lineages, positions))
    counters = torch.from_numpy(counters_of(seeds, streams, lineages, positions)).to(device)
    logits = torch.zeros(n, 3001, device=device)
    drawn = sample_rows(logits, counters, backend=backend).tokens
    assert torch.equal(drawn, sample_rows(logits, wanted.to(device), backend=backend).tokens)
    assert drawn.tolist() == one_running_sum(logits, wanted, torch.ones(n))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_sample_rows_draws_no_token_of_probability_zero(run, uniform):
    device, backend = run
    places = [[3071], [0], [255, 256], [5, 2055], list(range(1024, 2048)), [1023, 1024]]
    logits = torch.full((len(places), 3072), -torch.inf, device=device)
    for row, place in zip(logits, places, strict=True):
        row[place] = 5 * normal(len(place), seed=len(place), device=device)
    draws = torch.full((len(places),), uniform, dtype=torch.float64, device=device)
    drawn = sample_rows(logits, draws, 0.7, backend=backend).tokens.tolist()
    assert all(token in place for token, place in zip(drawn, places, strict=True))
    if uniform == 0.0:
        assert drawn == [place[0] for place in places]


def test_sample_rows_depends_on_no_other_row(run):
    device, backend = run
    logits = 2 * normal(8, 2100, seed=5, device=device)
    draws = torch.rand(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    together = sample_rows(logits, draws, backend=backend)
    for i in (0, 7):
        alone = sample_rows(logits[i : i + 1], draws[i : i + 1], backend=backend)
        assert together.tokens[i] == alone.tokens[0]


def test_sample_rows_at_a_temperature_next_to_none_takes_the_most_probable(run):
    device, backend = run
    logits = normal(6, 700, seed=6, device=device)
    draws = torch.full((6,), 0.999, dtype=torch.float64, device=device)
    for heat in (0.0, 1e-300, 1e-20):
        assert torch.equal(sample_rows(logits, draws, heat, backend=backend).tokens, logits.argmax(-1))


def test_sample_rows_tells_of_rows_that_are_no_numbers(run):
    device, backend = run
    logits = torch.zeros(3, 1500, device=device)
    logits[0, 1200], logits[1] = torch.nan, -torch.inf
    drawn = sample_rows(logits, torch.full((3,), 0.5, dtype=torch.float64, device=device), backend=backend)
    assert drawn.logprobs.isnan().tolist() == [True, True, False]
    assert drawn.top_logprobs.isnan().tolist() == [True, True, False]
    assert 0 <= int(drawn.tokens.min()) <= int(drawn.tokens.max()) < 1500


def test_sample_rows_frequencies_are_the_probabilities(run):
    """Chi-square over fixed seeds: 11 tokens, 10 degrees of freedom, whose 99.9 % quantile is 29.6."""
    device, backend = run
    n = 200 if INTERPRETED else 20000
    logits = normal(1, 11, seed=7, device=device).expand(n, -1).contiguous()
    numbers = [0] * n, [1] * n, range(n), [3] * n
    counters = torch.from_numpy(counters_of(*numbers)).to(device)
    drawn = sample_rows(logits, counters, 0.8, backend=backend).tokens
    wanted = n * (logits[0].double() / 0.8).softmax(-1).cpu()
    counted = torch.bincount(drawn.cpu(), minlength=11)
    assert float(((counted - wanted) ** 2 / wanted).sum()) < 29.6


# ------------------------------------------------------------------------------------------------ tree attention


def attend(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, slots: list[Tensor], new: list[int], *, dtype: torch.dtype,
    scale: float, softcap: float | None = None, window: int | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Row by row, head by head, every operation in `dtype`, the softmax in fp32 (as transformers' eager attention)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, group, first = torch.zeros(*q.shape[:2], v_pool.shape[2], dtype=dtype), q.shape[1] // k_pool.shape[1], 0
    for path, length in zip(slots, new, strict=True):
        if length == 0 or len(path) == 0:
            first += length
            continue
        queries = q[first : first + length].to(dtype).transpose(0, 1)  # [Hq, L, Dk]
        keys, values = (pool[path].to(dtype).transpose(0, 1).repeat_interleave(group, 0) for pool in (k_pool, v_pool))
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(len(path) - length, len(path))[:, None]
        j = torch.arange(len(path))[None, :]
        visible = (j <= i) if window is None else (j <= i) & (j > i - window)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, length, 1)], dim=-1)
        weights = scores.to(wide).softmax(-1).to(dtype)[..., : len(path)]
        out[first : first + length] = (weights @ values).transpose(0, 1)
        first += length
    return out


def tree_case(
    heads: tuple[int, int, int, int], new: list[int], old: list[int], dtype: torch.dtype, *, shared: int = 0
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Scattered slots; unused ones hold nan and unused table entries a slot that does not exist. All on the CPU."""
    hq, hkv, dk, dv = heads
    lengths = [a + b for a, b in zip(new, old, strict=True)]
    total = sum(lengths) + 7
    order = torch.randperm(total, generator=torch.Generator().manual_seed(sum(lengths)))[: sum(lengths)]
    slots = list(order.split(lengths))
    for row in range(1, len(slots), 2):  # pairs of rows begin with the same slots
        slots[row] = torch.cat([slots[row - 1][:shared], slots[row][shared:]])
    table = torch.full((len(new), max([*lengths, 1]) + 3), 1 << 30, dtype=torch.int32)
    pools = [torch.full((total, hkv, dim), torch.nan) for dim in (dk, dv)]
    for i, pool in enumerate(pools):
        pool[order] = normal(len(order), hkv, pool.shape[2], seed=51 + i)
    for row, path in enumerate(slots):
        table[row, : len(path)] = path.int()
    case = {
        "q": normal(sum(new), hq, dk, seed=50).to(dtype),
        "k_pool": pools[0].to(dtype),
        "v_pool": pools[1].to(dtype),
        "slot_table": table,
        "path_lens": torch.tensor(lengths, dtype=torch.int32),
        "q_starts": torch.tensor([0, *new]).cumsum(0).int(),
    }
    return case, slots


def check_attention(
    run: tuple[str, str], case: dict[str, Tensor], slots: list[Tensor], new: list[int], **options: object
) -> None:
    device, backend = run
    prefix = options.pop("prefix", None)
    sinks = options.get("sinks")
    where = {name: tensor.to(device) for name, tensor in case.items()}
    longest = max([len(path) for path in slots])
    ours = tree_attention(
        **where, **{**options, "sinks": None if sinks is None else sinks.to(device)}, max_new=max(new),
        max_path=longest, prefix=prefix, backend=backend,
    ).cpu()  # fmt: skip
    dtype, pools = case["q"].dtype, (case["q"], case["k_pool"], case["v_pool"])
    truth = attend(*pools, slots, new, dtype=torch.float64, **options)
    assert ours.dtype == dtype
    assert ours.shape == truth.shape
    no_worse(ours, attend(*pools, slots, new, dtype=dtype, **options), truth)


# (Hq, Hkv, Dk, Dv): grouped, multi-query with odd widths, multi-head with Dk > Dv (MLA's form), seven heads a group.
HEADS_OF = {"gqa": (4, 2, 16, 16), "mqa-odd": (3, 1, 24, 40), "mla": (2, 2, 48, 32), "g7": (7, 1, 16, 16)}
BATCHES = {
    "decode": ([1, 1, 1, 1], [4, 0, 150, 33]),
    "extend": ([17, 2, 5], [23, 63, 0]),
    "ragged": ([0, 1, 3, 0], [4, 0, 0, 0]),
}
KINDS = {
    "plain": {},
    "softcap-sinks": {"softcap": 3.0, "sinks": normal(8, seed=60)},
    "window": {"window": 7},
    "window-of-1": {"window": 1},
    "window-sinks": {"window": 20, "sinks": normal(8, seed=61)},
    "own-scale": {"scale": 0.5},
}


def options_of(kind: str, heads: tuple[int, int, int, int]) -> dict[str, object]:
    options = {"scale": heads[2] ** -0.5, **KINDS[kind]}
    if "sinks" in options:
        options["sinks"] = options["sinks"][: heads[0]]
    return options


# Every kind for grouped heads; for the other head layouts the two kinds that touch most of the kernel.
LAYOUTS = [("gqa", kind) for kind in KINDS]
LAYOUTS += [(heads, kind) for heads in HEADS_OF if heads != "gqa" for kind in ("plain", "window-sinks")]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("heads", "kind"), LAYOUTS)
def test_tree_attention_is_no_worse_than_eager(run, dtype, heads, batch, kind):
    new, old = BATCHES[batch]
    case, slots = tree_case(HEADS_OF[heads], new, old, dtype)
    check_attention(run, case, slots, new, **options_of(kind, HEADS_OF[heads]))


@pytest.mark.parametrize("kind", ["plain", "softcap-sinks"])
@pytest.mark.parametrize("new", [[1] * 4, [3, 1, 2, 5]], ids=["decode", "short-steps"])
def test_a_shared_prefix_changes_no_result(run, dtype, new, kind, monkeypatch):
    monkeypatch.setattr(tiles, "PREFIX_LEAST", 16)
    heads, device = HEADS_OF["gqa"], run[0]
    case, slots = tree_case(heads, new, [90, 70, 45, 60], dtype, shared=40)
    prefix = SharedPrefix(
        group_rows=torch.tensor([0, 2, 3, 4], dtype=torch.int32, device=device),  # a pair that shares, two that do not
        lengths=torch.tensor([40, 40, 0, 0], dtype=torch.int32, device=device),
        max_group_tokens=sum(new[:2]),
        max_length=40,
    )
    schedule = tiles.attention_schedule(
        capability=(0, 0), slots=4, half=True, rows=4, kv_heads=2, group=2, head_dim=16, max_new=max(new), max_path=95,
        groups=3, max_group_tokens=sum(new[:2]), max_prefix=40,
    )  # fmt: skip
    assert schedule.prefix_splits > 0
    check_attention(run, case, slots, new, prefix=prefix, **options_of(kind, heads))


def test_a_row_without_keys_gives_zeros(run, dtype):
    """What a padded row of a captured graph is: one query, no path."""
    device, backend = run
    out = tree_attention(
        normal(2, 2, 16, seed=1, dtype=dtype, device=device),
        normal(8, 1, 16, seed=2, dtype=dtype, device=device),
        normal(8, 1, 16, seed=3, dtype=dtype, device=device),
        slot_table=torch.tensor([[5, 5], [3, 0]], dtype=torch.int32, device=device),
        path_lens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        q_starts=torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        scale=0.25, max_new=1, max_path=2, backend=backend,
    )  # fmt: skip
    value = normal(8, 1, 16, seed=3, dtype=dtype, device=device)[3]
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    torch.testing.assert_close(out[1], value.expand(2, -1))


def test_attention_without_host_known_maxima(run):
    case, slots = tree_case(HEADS_OF["gqa"], [3, 1], [5, 9], torch.float32)
    device, backend = run
    where = {name: tensor.to(device) for name, tensor in case.items()}
    ours = tree_attention(**where, scale=0.25, backend=backend).cpu()
    truth = attend(case["q"], case["k_pool"], case["v_pool"], slots, [3, 1], dtype=torch.float64, scale=0.25)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_write_kv_fills_slots_and_skips_negative_ones(run, dtype, index):
    device, backend = run
    k_pool, v_pool = (torch.zeros(10, 3, dim, dtype=dtype, device=device) for dim in (24, 16))
    k_new, v_new = (normal(4, 3, dim, seed=dim, dtype=dtype, device=device) for dim in (24, 16))
    slots = torch.tensor([7, -1, 0, 4], dtype=index, device=device)
    write_kv(k_pool, v_pool, k_new, v_new, slots, backend=backend)
    for pool, new in ((k_pool, k_new), (v_pool, v_new)):
        expected = torch.zeros_like(pool)
        for token, slot in ((0, 7), (2, 0), (3, 4)):
            expected[slot] = new[token]
        assert torch.equal(pool, expected)


def test_write_kv_may_skip_every_token(run):
    device, backend = run
    k_pool, v_pool, new = (normal(4, 1, 16, seed=seed, device=device) for seed in range(3))
    before = k_pool.clone(), v_pool.clone()
    write_kv(k_pool, v_pool, new[:2], new[:2], torch.tensor([-1, -5], device=device), backend=backend)
    write_kv(k_pool, v_pool, new[:0], new[:0], torch.zeros(0, dtype=torch.int32, device=device), backend=backend)
    assert torch.equal(k_pool, before[0])
    assert torch.equal(v_pool, before[1])


def test_write_kv_from_a_fused_projection(run):
    """New keys and values as slices of one packed projection: strides of their own, no copy asked of the caller."""
    device, backend = run
    packed = normal(3, 2 * 2 * 16, seed=71, device=device)
    k_new, v_new = (part.view(3, 2, 16) for part in packed.split(32, dim=1))
    k_pool, v_pool = (torch.zeros(6, 2, 16, device=device) for _ in range(2))
    write_kv(k_pool, v_pool, k_new, v_new, torch.tensor([5, 1, 2], device=device), backend=backend)
    assert torch.equal(k_pool[[5, 1, 2]], k_new)
    assert torch.equal(v_pool[[5, 1, 2]], v_new)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["plain", "softcap-sinks", "window"])
@pytest.mark.parametrize("new", [[1] * 8, [64, 3, 200, 17]], ids=["decode", "extend"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
def test_tree_attention_at_model_size(dims, new, kind):
    heads = (8, 2, *dims)
    case, slots = tree_case(heads, new, [1500 + 37 * row for row in range(len(new))], torch.bfloat16)
    check_attention(("cuda", "triton"), case, slots, new, **options_of(kind, heads))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attention_replays_in_a_cuda_graph():
    """Nothing inside waits for the host or depends on values the host read: lengths may change between replays."""
    new, heads = [1, 1, 1], HEADS_OF["gqa"]
    case, slots = tree_case(heads, new, [40, 7, 120], torch.float16)
    static = {name: tensor.cuda() for name, tensor in case.items()}
    static["path_lens"] = torch.tensor([1, 1, 1], dtype=torch.int32, device="cuda")
    kwargs = {"scale": 0.25, "max_new": 1, "max_path": 128, "backend": "triton"}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tree_attention(**static, **kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(**static, **kwargs)
    static["path_lens"].copy_(case["path_lens"])
    graph.replay()
    truth = attend(case["q"], case["k_pool"], case["v_pool"], slots, new, dtype=torch.float64, scale=0.25)
    torch.testing.assert_close(out.cpu().double(), truth, rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------------------------ torch.compile


def test_compiled_calls_equal_eager_ones(run):
    """Whole graphs, no break: while compiling, the Triton launches are opaque operators."""
    device, backend = run
    hidden, weight, targets, bias, softcap, scale = head((5, 24, 70), HEADS[1], torch.float32, device, seed=81)
    operands = [t.requires_grad_() for t in (hidden, weight, bias)]
    case, _ = tree_case(HEADS_OF["gqa"], [2, 1], [3, 8], torch.float32)
    case = {name: tensor.to(device) for name, tensor in case.items()}

    def rewards(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, targets, bias, softcap, scale, backend=backend).square().sum()

    def rows(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logprob = linear_logprob(hidden, weight, targets, backend=backend)
        logits = hidden @ weight.T
        drawn = sample_rows(logits, torch.full((5,), 0.3, dtype=torch.float64, device=device), 0.9, backend=backend)
        return logprob, guide_logits(logits, logits + 1, -logits, 0.5, backend=backend), *drawn

    def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, new: Tensor) -> Tensor:
        write_kv(k_pool, v_pool, new, new, torch.tensor([1, 3], device=device), backend=backend)
        tables = {name: case[name] for name in ("slot_table", "path_lens", "q_starts")}
        return tree_attention(q, k_pool, v_pool, **tables, scale=0.25, max_new=2, max_path=9, backend=backend)

    whole = {"backend": "aot_eager", "fullgraph": True}
    ours, plain = (torch.autograd.grad(f(*operands), operands) for f in (torch.compile(rewards, **whole), rewards))
    torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(rows, **whole)(hidden, weight), rows(hidden, weight))
        pools = [[case["k_pool"].clone(), case["v_pool"].clone()] for _ in range(2)]
        new = normal(2, 2, 16, seed=82, device=device)
        torch.testing.assert_close(
            torch.compile(attend, **whole)(case["q"], *pools[0], new), attend(case["q"], *pools[1], new)
        )
        torch.testing.assert_close(pools[0], pools[1], equal_nan=True)
