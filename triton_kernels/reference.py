"""Eager oracles of every op in this package; they are also the CPU path and what ``backend="torch"`` runs.

Nothing here imports Triton or launches a kernel. Half-precision operands are widened before they are summed, so
each function is exact to fp32 (float64 operands are computed in float64, which is what gradcheck needs).
The arguments are checked by the public functions, not here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prm_search.triton_kernels.calls import AttentionCall, HeadCall

# Elements of the largest temporaries, sized to stay in cache: 4 MiB of fp32 logits, 8 MiB of widened head rows.
_LOGIT_BUDGET = 1 << 20
_WEIGHT_BUDGET = 1 << 21
_ROW_BLOCK = 8192


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` products are kept in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a [M, K] @ b [K, N]` whose result keeps the accumulator's dtype instead of rounding to the operands'."""
    out = accumulate_dtype(a.dtype)
    if a.dtype == out:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out)
    return a.to(out) @ b.to(out)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities `[..., V]` of logits, nats, in the dtype that sums are kept in.

    torch's own fp32 log_softmax loses the tail's mass in one running sum: over 262,144 entries it is some 1e-5 nat too
    high, for every token alike, which a sum over a response adds up. logsumexp adds pairwise and has no such bias.
    """
    wide = logits.to(accumulate_dtype(logits.dtype))
    return wide - torch.logsumexp(wide, dim=-1, keepdim=True)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`, in place; the logits themselves when there is no cap."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


# --------------------------------------------------------------------------------------------- linear_logprob


def _logits(call: HeadCall) -> Tensor:
    logits = matmul(call.hidden, call.weight.t())
    if call.bias is not None:
        logits += call.bias
    if call.scale != 1.0:
        logits *= call.scale
    return capped(logits, call.softcap)


def _vocabulary_chunks(rows: int, weight: Tensor) -> Iterator[tuple[int, int]]:
    vocabulary, depth = weight.shape
    width = max(_LOGIT_BUDGET // max(rows, 1), 256)
    if accumulate_dtype(weight.dtype) != weight.dtype and not weight.is_cuda:  # these rows are widened: bound the copy
        width = min(width, max(_WEIGHT_BUDGET // max(depth, 1), 256))
    for start in range(0, vocabulary, width):
        yield start, min(start + width, vocabulary)


def linear_logprob(call: HeadCall) -> tuple[Tensor, Tensor]:
    """log p(target) and logsumexp, each `[N]`, without keeping `[N, V]`: a running logsumexp over vocabulary chunks.

    Equals `log_softmax(cap(scale * (hidden @ weight.T + bias)))` gathered at the targets.
    """
    dtype = accumulate_dtype(call.hidden.dtype)
    logprob = call.hidden.new_empty(call.rows, dtype=dtype)
    logsumexp = torch.empty_like(logprob)
    for first in range(0, call.rows, _ROW_BLOCK):
        rows = slice(first, first + _ROW_BLOCK)
        x, target = call.hidden[rows], call.targets[rows].long()
        top = x.new_full((x.shape[0],), -torch.inf, dtype=dtype)  # running maximum, and sum of exp relative to it
        total = x.new_zeros((x.shape[0],), dtype=dtype)
        target_logit = x.new_full((x.shape[0],), torch.nan, dtype=dtype)
        for start, stop in _vocabulary_chunks(x.shape[0], call.weight):
            logits = _logits(call.columns(start, stop)._replace(hidden=x))
            inside = (target >= start) & (target < stop)
            column = (target - start).clamp(0, stop - start - 1)
            target_logit = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target_logit)
            new_top = torch.maximum(top, logits.amax(dim=1))
            shift = torch.where(new_top == -torch.inf, 0.0, new_top)  # all masked so far: keep nan out
            total = total * (top - shift).exp() + logits.sub_(shift[:, None]).exp_().sum(dim=1)
            top = new_top
        # The maximum is taken off before the logarithm is: far from 0, logsumexp itself is rounded to the logits' ulp.
        logprob[rows], logsumexp[rows] = (target_logit - top) - total.log(), top + total.log()
    return logprob, logsumexp


def logit_gradient(
    call: HeadCall, logsumexp: Tensor, grad_logprob: Tensor, grad_logsumexp: Tensor, start: int
) -> Tensor:
    """Gradient `[N, Vc]` with respect to `hidden @ weight.T + bias`, for a chunk of `Vc` columns from `start` on.

    With p the softmax: `g_logprob * (onehot - p) + g_lse * p`, through the cap's and the scale's derivative.
    """
    logits = _logits(call)
    grad = (logits - logsumexp[:, None]).exp_().mul_((grad_logsumexp - grad_logprob)[:, None])
    column = call.targets.long() - start
    inside = (column >= 0) & (column < call.weight.shape[0])
    hit = torch.where(inside, grad_logprob, 0.0).to(grad.dtype)
    grad.scatter_add_(1, column.clamp(0, call.weight.shape[0] - 1)[:, None], hit[:, None])
    if call.softcap is not None:
        grad.mul_(1.0 - (logits / call.softcap).square_())
    return grad if call.scale == 1.0 else grad.mul_(call.scale)


# ----------------------------------------------------------------------------------------------- guide_logits


def guide_logits(policy_logits: Tensor, prm: Tensor, reference: Tensor, alpha: Tensor) -> Tensor:
    """`policy + alpha * (log_softmax(prm) - log_softmax(reference))`, `[B, V]` in the policy's dtype."""
    width = min(policy_logits.shape[1], prm.shape[1], reference.shape[1])
    return guide_by_ratio(policy_logits, log_softmax(prm)[:, :width] - log_softmax(reference)[:, :width], alpha)


def guide_by_ratio(policy_logits: Tensor, ratio: Tensor, alpha: Tensor) -> Tensor:
    """`policy + alpha * ratio` on the columns that the ratio has, `[B, V]` in the policy's dtype."""
    width, dtype = ratio.shape[1], accumulate_dtype(policy_logits.dtype)
    ratio, policy = ratio.to(dtype), policy_logits[:, :width]
    steered = torch.addcmul(policy.to(dtype), alpha[:, None].to(dtype), ratio).to(policy.dtype)
    # A token that either model holds impossible has no ratio and stays as it is; the policy's own -inf stays by itself.
    steered = torch.where(ratio.isfinite(), steered, policy)
    return steered if width == policy_logits.shape[1] else torch.cat([steered, policy_logits[:, width:]], dim=1)


# ------------------------------------------------------------------------------------------------ sample_rows

COLDEST = 1e-30  # temperatures below are this one: the smallest floats are 0 where numbers are divided by them
_BLOCK = 256  # columns that are summed first: a running sum over a whole vocabulary in fp64 would be most of the time
_LOW = 0xFFFFFFFF


def philox_uniforms(counters: Tensor) -> Tensor:
    """Numbers in [0, 1), fp64 `[R]`, of int64 `[R, 3]` (key, lineage, position): Philox 4x32-10.

    The low 64 bits of a product of two 32-bit numbers are all of it, and torch's int64 keeps them whatever their sign.
    """
    key, lineage, position = counters.unbind(1)
    c0, c1, c2, c3 = lineage & _LOW, (lineage >> 32) & _LOW, position & _LOW, torch.zeros_like(position)
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return ((c0 << 21) | (c1 >> 11)).double() * 2.0**-53


def sample_rows(logits: Tensor, draws: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their log-probabilities and the most probable tokens', each `[R]`; a few rows at a time, in cache."""
    uniform = draws if draws.dtype == torch.float64 else philox_uniforms(draws)
    rows, vocabulary = logits.shape
    many = max(1, _LOGIT_BUDGET // vocabulary)
    if rows <= many:
        return _sample_few(logits, uniform, temperature)
    parts = []
    for first in range(0, rows, many):
        some = slice(first, first + many)
        heat = temperature[some] if isinstance(temperature, Tensor) else temperature
        parts.append(_sample_few(logits[some], uniform[some], heat))
    tokens, logprobs, tops = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs), torch.cat(tops)


def _sample_few(logits: Tensor, uniform: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.to(accumulate_dtype(logits.dtype))
    if isinstance(temperature, Tensor):
        cold = temperature == 0
        readable = not logits.is_cuda and not torch.compiler.is_compiling()
        greedy = None if readable and not bool(cold.any()) else cold
        rate: Tensor | float = (1 / temperature.to(wide.dtype).clamp(min=COLDEST))[:, None]
    else:
        greedy = None if temperature else torch.ones_like(uniform, dtype=torch.bool)
        rate = 1 / max(temperature, COLDEST)
    top = wide.amax(dim=-1, keepdim=True)
    weights = wide - top
    if isinstance(rate, float) and rate == 1.0:
        sums = _block_sums(weights.exp_())
        total = sums[:, -1:]
    else:
        total = _block_sums(weights.exp())[:, -1:]
        sums = _block_sums(weights.mul_(rate).exp_())
    tokens = _inverse_cdf(weights, sums, uniform[:, None])
    if greedy is not None:
        tokens = torch.where(greedy, wide.argmax(dim=-1), tokens)
    rest = total.log()
    drawn = (wide.gather(1, tokens[:, None]) - top) - rest
    return tokens, drawn[:, 0].to(wide.dtype), (-rest)[:, 0].to(wide.dtype)


def _block_sums(weights: Tensor) -> Tensor:
    """Running sums of `[R, V]` after each block of columns, fp64 `[R, blocks]`; after each column of a single block."""
    if weights.shape[1] <= _BLOCK:
        return weights.cumsum(-1, dtype=torch.float64)
    whole = weights.shape[1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1) if whole else weights[:, :0]
    if whole < weights.shape[1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    return sums.cumsum(-1, dtype=torch.float64)


def _inverse_cdf(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """The column at which the running sum of weights first exceeds uniform times their total: `[R]` int64, never one
    of weight 0. `sums`: after each block; uniform: `[R, 1]` fp64."""
    goal = _below(uniform * sums[:, -1:], sums)
    if weights.shape[1] <= _BLOCK:
        return torch.searchsorted(sums, goal, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)
    block = torch.searchsorted(sums, goal, right=True).clamp(max=sums.shape[1] - 1)  # NaN has no place
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block * _BLOCK + torch.arange(min(_BLOCK, weights.shape[1]), device=weights.device)
    outside = columns >= weights.shape[1]
    inside = weights.gather(1, columns.clamp(max=weights.shape[1] - 1)).masked_fill_(outside, 0.0)
    running = inside.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(running, _below(goal - before, running), right=True)
    return (block * _BLOCK + place).squeeze(1).clamp_(max=weights.shape[1] - 1)


def _below(goal: Tensor, sums: Tensor) -> Tensor:
    """`goal` [R, 1], kept below the last of its row's running sums, which rounding may have it reach."""
    last = sums[:, -1:]
    return torch.minimum(goal, torch.nextafter(last, torch.zeros_like(last)))


# --------------------------------------------------------------------------------------------- tree_attention


def tree_attention(call: AttentionCall) -> Tensor:
    """Attention of packed new tokens over their paths: one padded gather, an explicit mask, an fp32 softmax.

    Shapes as in the public function; `[T, Hq, Dv]` in q's dtype. Tokens of rows without any visible key give 0.
    """
    q, k_pool, v_pool, slot_table, path_lens, q_starts, scale, softcap, window, sinks, *_ = call
    dtype, (tokens, heads, _) = accumulate_dtype(q.dtype), q.shape
    rows, kv_heads, v_dim = call.rows, k_pool.shape[1], v_pool.shape[2]
    if tokens == 0 or rows == 0:
        return q.new_zeros(tokens, heads, v_dim)
    max_new, max_path = call.longest_new, call.longest_path
    starts, lens = q_starts.long(), path_lens.long()

    # Padded views: queries [B, L, Hkv, G, Dk], keys [B, S, Hkv, Dk], values [B, S, Hkv, Dv].
    index = (starts[:-1, None] + torch.arange(max_new, device=q.device)).clamp(max=tokens - 1)
    queries = q[index].to(dtype).view(rows, max_new, kv_heads, heads // kv_heads, -1)
    key_position = torch.arange(max_path, device=q.device)
    used = key_position < lens[:, None]  # [B, S]
    slots = torch.where(used, slot_table[:, :max_path].long(), 0)
    keys, values = k_pool[slots].to(dtype), v_pool[slots].to(dtype)
    values = values.masked_fill(~used[:, :, None, None], 0.0)  # 0 * nan of an unwritten slot would be nan

    scores = torch.einsum("blhgd,bshd->bhgls", queries, keys) * scale
    scores = capped(scores, softcap)
    position = (lens - starts[1:] + starts[:-1])[:, None] + torch.arange(max_new, device=q.device)  # [B, L]
    visible = (key_position <= position[:, :, None]) & used[:, None, :]
    if window is not None:
        visible &= key_position > position[:, :, None] - window
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, kv_heads, -1, 1, 1)
        top = torch.maximum(top, sink)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (scores - top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:  # a sink takes probability and gives no value (gpt-oss)
        total = total + (sink - top).exp()
    weights = weights / torch.where(total == 0, 1.0, total)
    padded = torch.einsum("bhgls,bshd->blhgd", weights, values).reshape(rows, max_new, heads, v_dim)

    # Back to the packed order, without a boolean index (which would wait for the device).
    token = torch.arange(tokens, device=q.device)
    row = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, rows - 1)
    return padded[row, (token - starts[row]).clamp(max=max_new - 1)].to(q.dtype)


def write_kv(k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, slots: Tensor) -> None:
    """`k_pool[slots[t]] = k_new[t]`, the same for v; a negative slot is skipped, without waiting for the device."""
    if slots.shape[0] == 0:
        return
    keep, index = slots >= 0, slots.long()
    if not slots.is_cuda and not torch.compiler.is_compiling() and bool(keep.all()):  # the usual case: nothing to skip
        k_pool[index], v_pool[index] = k_new, v_new
    else:
        _write_kept(k_pool, v_pool, k_new, v_new, keep, index)


def _write_kept(k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, keep: Tensor, index: Tensor) -> None:
    # A skipped token repeats the first kept token's write; where none is kept, slot 0 is given its own value.
    first = keep.int().argmax(dim=0, keepdim=True)  # [1]
    index = torch.where(keep, index, index[first]).clamp(min=0)
    for pool, new in ((k_pool, k_new), (v_pool, v_new)):
        pool[index] = torch.where(keep[:, None, None], new, torch.where(keep[first, None, None], new[first], pool[:1]))
