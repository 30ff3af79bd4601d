"""Launches of the linear kernels: which tile, how many splits, which arguments. Imports Triton only to launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prm_search.triton_kernels import launch, tiles
from prm_search.triton_kernels.calls import HeadCall
from prm_search.triton_kernels.tiles import MatmulTile

_MERGE_ROWS = 128


def tile_of(call: HeadCall, gradient: bool = False) -> MatmulTile:
    return tiles.matmul_tile(
        capability=launch.capability(call.hidden.device),
        rows=call.rows,
        half=call.hidden.dtype != torch.float32,
        tma=_describable(call.hidden) and _describable(call.weight),
        plain=call.plain,
        gradient=gradient,
    )


def schedule_of(call: HeadCall) -> tuple[MatmulTile, int]:
    """The tile, and how many programs share each row tile's vocabulary."""
    tile = tile_of(call)
    slots = max(launch.processors(call.hidden.device) * tile.resident, 1)
    return tile, tiles.matmul_splits(call.rows, call.weight.shape[0], tile, slots)


def _prepared(call: HeadCall) -> HeadCall:
    """The call as the kernels take it: hidden rows are copied only if their last stride is not 1."""
    hidden = call.hidden if call.hidden.stride(1) == 1 else call.hidden.contiguous()
    bias = None if call.bias is None else call.bias.contiguous()
    return call._replace(hidden=hidden, targets=call.targets.contiguous(), bias=bias)


def _pointers(call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return call.hidden, call.weight, call.weight if call.bias is None else call.bias, call.targets


def _sizes(call: HeadCall) -> tuple[int, int, int, int, int]:
    return call.rows, *call.weight.shape, call.hidden.stride(0), call.weight.stride(0)


def _numbers(call: HeadCall) -> tuple[float, float]:
    return float(call.scale), 1.0 if call.softcap is None else float(call.softcap)


def _describable(tensor: Tensor) -> bool:
    """Return True if a TMA descriptor can be built: 16-byte aligned base and row stride."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _options(call: HeadCall, tile: MatmulTile) -> dict[str, Any]:
    return {
        "HAS_BIAS": call.bias is not None,
        "HAS_CAP": call.softcap is not None,
        "EVEN_D": call.weight.shape[1] % tile.k == 0,
        "TMA": tile.tma,
        "PRECISION": "ieee" if call.hidden.dtype == torch.float32 else "tf32",  # half operands are exact either way
        "BM": tile.m,
        "BV": tile.v,
        "BK": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _launcher(tile: MatmulTile) -> Callable[..., None]:
    return launch.launch_with_scratch if tile.tma else launch.launch


def forward(call: HeadCall) -> tuple[Tensor, Tensor]:
    """log p(target) and logsumexp, each `[N]` fp32."""
    logprob = call.hidden.new_empty(call.rows, dtype=torch.float32)
    logsumexp = torch.empty_like(logprob)
    if call.rows == 0:
        return logprob, logsumexp
    from prm_search.triton_kernels import _jit_linear as jit

    call = _prepared(call)
    tile, splits = schedule_of(call)
    parts = logprob.new_empty((3, splits, call.rows))
    _launcher(tile)(
        jit.split_kernel, (-(-call.rows // tile.m) * splits,), logprob.device, *_pointers(call), parts,
        *_sizes(call), *_numbers(call), splits, RAW=call.plain, **_options(call, tile),
    )  # fmt: skip
    launch.launch(
        jit.merge_kernel, (-(-call.rows // _MERGE_ROWS),), logprob.device, parts, call.targets, logprob, logsumexp,
        call.rows, call.weight.shape[0], splits, BN=_MERGE_ROWS,
    )  # fmt: skip
    return logprob, logsumexp


def logit_gradient(
    call: HeadCall, logsumexp: Tensor, grad_logprob: Tensor, grad_logsumexp: Tensor, first: int
) -> Tensor:
    """Gradient `[N, Vc]` of the products of a vocabulary chunk from `first` on, in the operands' dtype."""
    grad = call.hidden.new_empty(call.rows, call.weight.shape[0])
    if call.rows == 0:
        return grad
    from prm_search.triton_kernels import _jit_linear as jit

    call = _prepared(call)
    tile = tile_of(call, gradient=True)
    _launcher(tile)(
        jit.logit_gradient_kernel, (-(-call.rows // tile.m) * -(-grad.shape[1] // tile.v),), grad.device,
        *_pointers(call), logsumexp, grad_logprob, grad_logsumexp, grad, *_sizes(call), grad.stride(0), first,
        *_numbers(call), **_options(call, tile),
    )  # fmt: skip
    return grad
