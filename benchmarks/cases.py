"""A case of the kernels suite: one op at one shape, ours and the rivals, timed, weighed and compared with float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Ceilings, Machine, memory, on_device, ratio
from torch import Tensor

from prm_search.triton_kernels import Choice

Way = Callable[[], Tensor]


@dataclass(frozen=True)
class Absent:
    """A rival that cannot run here, and why; its line says so."""

    why: str


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: the op's name.
        shape: what its sizes are, for the report.
        ways: "ours" and every rival; each computes the same, but for those in `unlike`.
        choice: what ours runs.
        exact: the checked part of the result in float64, from the same operands.
        checked: that part of a way's result.
        flop, size: floating point operations, and bytes that must be read or written once: the floor.
        unlike: ways that compute less, as a yardstick; they have no error.
        notes: further numbers for the line.
    """

    op: str
    shape: dict[str, int]
    ways: dict[str, Way | Absent]
    choice: Choice
    exact: Callable[[], Tensor]
    flop: float
    size: float
    checked: Callable[[Tensor], Tensor] = lambda result: result
    unlike: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


def measure(case: Case, machine: Machine, repeats: int) -> dict[str, Any]:
    """One line of the report. A rival that fails is reported with its reason; ours that fails raises."""
    lines: dict[str, dict[str, Any]] = {}
    runs: dict[str, Way] = {}
    truth = case.exact()
    for name, way in case.ways.items():
        if isinstance(way, Absent):
            lines[name] = {"absent": way.why}
            continue
        try:
            result = case.checked(way())
        except torch.OutOfMemoryError:
            lines[name] = {"absent": "out of memory"}
        except Exception as problem:
            if name == "ours":
                raise
            lines[name] = {"absent": f"{type(problem).__name__}: {_first_line(problem)}"}
        else:
            runs[name] = way
            lines[name] = {} if name in case.unlike else _errors(result, truth)
            del result
    for name, way in runs.items():
        if torch.cuda.is_available() or not name.startswith("compiled"):  # counting tensors makes a graph run eagerly
            lines[name] |= memory(way)
    seconds = on_device(runs, repeats)
    floor, bound = Ceilings.measure(machine).floor(case.flop, case.size)
    for name, values in seconds.items():
        middle = statistics.median(values)
        lines[name] |= {
            "ms": 1e3 * middle,
            "over_ours": ratio(values, seconds["ours"]),
            "share_of_floor": floor / middle,
        }
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "backend": case.choice.backend,
        "detail": case.choice.detail,
        "floor_ms": 1e3 * floor,
        "bound": bound,
        "ways": lines,
        **case.notes,
    }


def _errors(result: Tensor, truth: Tensor) -> dict[str, float]:
    apart = (result.double() - truth).abs()
    return {"error_max": apart.max().item(), "error_rms": apart.square().mean().sqrt().item()}


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), "")[:120]


def bound(function: Callable[..., Tensor], *operands: Any) -> Way:
    """A function with its operands."""
    return lambda: function(*operands)


def compiled(function: Callable[..., Tensor], *operands: Any, skip: bool = False) -> Way | Absent:
    """torch.compile of a formula as it is written: the compiler decides what is fused, not a loop of ours."""
    if skip:
        return Absent("left out of --quick: its compilation takes longer than all the rest")
    torch.compiler.reset()  # each case has its own shapes
    return bound(torch.compile(function, dynamic=False), *operands)


def run(cases: Iterator[Case], machine: Machine, repeats: int) -> list[dict[str, Any]]:
    """The lines of cases that are made one at a time, so that their operands never share the memory."""
    lines = []
    for case in cases:
        lines.append(measure(case, machine, repeats))
        del case
    return lines
