"""`sample_rows`: draw a token a row from logits, with its log-probability, in one pass over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prm_search.triton_kernels import _rows_launch, launch, reference
from prm_search.triton_kernels.launch import Backend, Choice


class Drawn(NamedTuple):
    """The tokens drawn, one a row, and what the pass over their logits knows besides.

    Fields: `tokens` int64 `[R]`; `logprobs` `[R]`, nats, of the tokens under softmax(logits), before temperature;
    `top_logprobs` `[R]` of each row's most probable token. Both fp32, fp64 for fp64 logits.
    """

    tokens: Tensor
    logprobs: Tensor
    top_logprobs: Tensor


def sample_rows(
    logits: Tensor, draws: Tensor, temperature: Tensor | float = 1.0, *, backend: Backend = "auto"
) -> Drawn:
    """A draw from softmax(logits / temperature) in each row, by the inverse CDF in vocabulary order.

    The token is the first whose cumulative probability exceeds the row's uniform number, so one number a row decides,
    and neither the other rows nor the tiles a GPU works in have a part in it. There is no sort, no random number a
    token, and no `[R, V]` temporary on a GPU; on a CPU the temporaries stay in cache.

    On a GPU two launches: maximum and sum of exp of each share of a row; then the share and the token in it.

    Args:
        logits: `[R, V]`, floating, -inf where forbidden. V below 2^24.
        draws: uniform numbers in [0, 1), fp64 `[R]`; or counters, int64 `[R, 3]`, whose columns are key, lineage and
            position: the number is then Philox 4x32-10 of (lineage, position) under the key, as prm_search.rng has it.
        temperature: floating `[R]`, or a number for all; 0 takes the most probable token, the first of equals.
        backend: "auto" takes Triton on CUDA operands that it supports, else torch; `choice(sample_rows, ...)` tells.

    Returns:
        A `Drawn`. A row that holds NaN, or nothing but -inf, has NaN for its log-probabilities and any token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, V is 0 or too large, or backend="triton" is impossible.
        TypeError: an operand is of another kind.
    """
    plan = _plan(logits, draws, temperature, backend=backend)
    if plan.backend == "torch":
        return Drawn(*reference.sample_rows(logits, draws, temperature))
    if not isinstance(temperature, Tensor):
        temperature = torch.full((logits.shape[0],), temperature, dtype=torch.float32, device=logits.device)
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return Drawn(*compiled.sample_rows(logits, draws, temperature))
    return Drawn(*_rows_launch.sample_rows(logits, draws, temperature))


def _plan(logits: Tensor, draws: Tensor, temperature: Tensor | float = 1.0, *, backend: Backend = "auto") -> Choice:
    launch.check_matrix("logits", logits, 2)
    rows, vocabulary = logits.shape
    if not 0 < vocabulary < 1 << 24:
        raise ValueError(f"logits has {vocabulary} columns; 1 to {(1 << 24) - 1} are needed")
    if not isinstance(draws, Tensor):
        raise TypeError(f"draws is {type(draws).__name__}; a torch.Tensor is needed")
    kind = (draws.dtype, tuple(draws.shape))
    if kind not in ((torch.float64, (rows,)), (torch.int64, (rows, 3))) or draws.device != logits.device:
        raise ValueError(
            f"draws is {list(draws.shape)} {draws.dtype} on {draws.device}; float64 [{rows}] or int64 [{rows}, 3] on "
            f"{logits.device} is needed"
        )
    if isinstance(temperature, Tensor):
        launch.check_matrix("temperature", temperature, 1)
        if temperature.shape[0] != rows or temperature.device != logits.device:
            raise ValueError(
                f"temperature is {list(temperature.shape)} on {temperature.device}; [{rows}] on {logits.device} is "
                "needed"
            )
    elif launch.finite("temperature", temperature) < 0:
        raise ValueError(f"temperature is {temperature!r}; a number >= 0 is needed")
    why_not = None
    if backend != "torch":
        why_not = launch.obstacle(logits)
        if why_not is None and vocabulary > 1 and logits.stride(1) != 1:
            why_not = f"logits has strides {logits.stride()}; its last dimension must be contiguous"
    return launch.decide("sample_rows", backend, why_not, logits)


launch.register(sample_rows, _plan)
