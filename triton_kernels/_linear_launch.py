"""Launches of the linear kernels: which tile, how many splits, which arguments. Imports Triton only to launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prm_search.triton_kernels import launch, tiles
from prm_search.triton_kernels.tiles import MatmulTile

_MERGE_ROWS = 128


class Head:
    """One head's operands, as its kernels take them. Hidden rows are copied only if their last stride is not 1."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float):
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.weight = weight
        self.bias = None if bias is None else bias.contiguous()
        self.softcap, self.scale = softcap, float(scale)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.weight if self.bias is None else self.bias

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        vocabulary, depth = self.weight.shape
        return vocabulary, depth, self.hidden.stride(0), self.weight.stride(0)

    @property
    def numbers(self) -> tuple[float, float]:
        return self.scale, 1.0 if self.softcap is None else float(self.softcap)

    def switches(self, tile: MatmulTile, prefix: str = "") -> dict[str, bool]:
        return {
            f"{prefix}HAS_BIAS": self.bias is not None,
            f"{prefix}HAS_CAP": self.softcap is not None,
            f"{prefix}EVEN_D": self.weight.shape[1] % tile.k == 0,
        }

    def tile(self, gradient: bool = False) -> MatmulTile:
        return tiles.matmul_tile(
            capability=launch.capability(self.hidden.device),
            rows=self.hidden.shape[0],
            half=self.hidden.dtype != torch.float32,
            tma=_describable(self.hidden) and _describable(self.weight),
            plain=self.bias is None and self.softcap is None,
            gradient=gradient,
        )

    def schedule(self, share: int = 1) -> tuple[MatmulTile, int]:
        """The tile and the number of vocabulary splits, where `share` heads divide the device between them."""
        tile = self.tile()
        slots = max(launch.processors(self.hidden.device) * tile.resident // share, 1)
        return tile, tiles.matmul_splits(self.hidden.shape[0], self.weight.shape[0], tile, slots)


def joint(prm: Head, ref: Head) -> bool:
    """Whether one launch covers both heads: few rows, one dtype, and a tile that reads all operands."""
    few = prm.hidden.shape[0] < tiles.PAIR_ROWS and prm.hidden.dtype == ref.hidden.dtype
    return few and prm.tile() == ref.tile()


def _describable(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can be built: 16-byte aligned base and row stride."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _options(tile: MatmulTile, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "TMA": tile.tma,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # half operands are exact either way
        "BM": tile.m,
        "BV": tile.v,
        "BK": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _launcher(tile: MatmulTile) -> Callable[..., None]:
    return launch.launch_with_scratch if tile.tma else launch.launch


def _partials(head: Head, targets: Tensor, tile: MatmulTile, splits: int) -> Tensor:
    from prm_search.triton_kernels import _jit_linear as jit

    rows = head.hidden.shape[0]
    parts = head.hidden.new_empty((3, splits, rows), dtype=torch.float32)
    _launcher(tile)(
        jit.split_kernel, (-(-rows // tile.m) * splits,), head.hidden.device, *head.pointers, targets, parts, rows,
        *head.sizes, *head.numbers, splits, **head.switches(tile), **_options(tile, head.hidden.dtype),
    )  # fmt: skip
    return parts


def forward(head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and logsumexp, each `[N]` fp32."""
    rows = head.hidden.shape[0]
    logprob = head.hidden.new_empty(rows, dtype=torch.float32)
    logsumexp = torch.empty_like(logprob)
    if rows == 0:
        return logprob, logsumexp
    from prm_search.triton_kernels import _jit_linear as jit

    targets = targets.contiguous()
    tile, splits = head.schedule()
    parts = _partials(head, targets, tile, splits)
    launch.launch(
        jit.merge_kernel, (-(-rows // _MERGE_ROWS),), logprob.device, parts, targets, logprob, logsumexp, rows,
        head.weight.shape[0], splits, BN=_MERGE_ROWS,
    )  # fmt: skip
    return logprob, logsumexp


def forward_pair(prm: Head, ref: Head, targets: Tensor, beta: float) -> Tensor:
    """Token rewards `[N]` fp32: one split launch (`joint`) or two, and one merge."""
    rows = prm.hidden.shape[0]
    out = prm.hidden.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return out
    from prm_search.triton_kernels import _jit_linear as jit

    targets = targets.contiguous()
    if joint(prm, ref):
        tile, splits = prm.schedule(share=2)
        ref_splits = splits
        parts, ref_parts = out.new_empty((2, 3, splits, rows))
        _launcher(tile)(
            jit.split_pair_kernel, (-(-rows // tile.m) * splits, 2), out.device,
            *prm.pointers, parts, *prm.sizes, *prm.numbers, *ref.pointers, ref_parts, *ref.sizes, *ref.numbers,
            targets, rows, splits,
            **prm.switches(tile), **ref.switches(tile, "REF_"), **_options(tile, prm.hidden.dtype),
        )  # fmt: skip
    else:
        (tile, splits), (ref_tile, ref_splits) = prm.schedule(), ref.schedule()
        parts = _partials(prm, targets, tile, splits)
        ref_parts = _partials(ref, targets, ref_tile, ref_splits)
    launch.launch(
        jit.merge_pair_kernel, (-(-rows // _MERGE_ROWS),), out.device, parts, ref_parts, targets, out, rows,
        prm.weight.shape[0], ref.weight.shape[0], splits, ref_splits, beta, BN=_MERGE_ROWS,
    )  # fmt: skip
    return out


def logit_gradient(
    head: Head, targets: Tensor, logsumexp: Tensor, grad_logprob: Tensor, grad_logsumexp: Tensor, first: int
) -> Tensor:
    """Gradient `[N, Vc]` of the products of a vocabulary chunk from `first` on, in the operands' dtype."""
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    grad = head.hidden.new_empty(rows, columns)
    if rows == 0:
        return grad
    from prm_search.triton_kernels import _jit_linear as jit

    tile = head.tile(gradient=True)
    _launcher(tile)(
        jit.logit_gradient_kernel, (-(-rows // tile.m) * -(-columns // tile.v),), grad.device, *head.pointers,
        targets.contiguous(), logsumexp, grad_logprob, grad_logsumexp, grad, rows, *head.sizes, grad.stride(0),
        first, *head.numbers, **head.switches(tile), **_options(tile, head.hidden.dtype),
    )  # fmt: skip
    return grad
