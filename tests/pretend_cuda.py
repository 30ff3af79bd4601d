"""The GPU suite without a GPU: its branches for CUDA, at small sizes, on tensors of the CPU. Run by test_benchmarks.

What asks for a device gets the CPU, and torch.cuda's clocks and counters are stand-ins. Launches of kernels and graphs
are all that is left out, so an argument that does not fit, or a name that is missing, shows here and not on a machine
that is lent for minutes.

python tests/pretend_cuda.py LINES
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

import common  # noqa: E402
import gpu_run  # noqa: E402
import torch  # noqa: E402

from prm_search.engine import language_model  # noqa: E402
from prm_search.engine.encoder import Encoder  # noqa: E402

TABLES = ("ops", "decoding", "scoring", "host", "searching")


class Cuda(str):
    """A device's name that says "cuda" to Python, and "cpu" to torch."""

    __slots__ = ()

    def __new__(cls) -> Cuda:
        return super().__new__(cls, "cpu")

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __hash__(self) -> int:
        return hash("cuda")


class Event:
    """A clock of the host's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def pretend() -> list[tuple[str, Any]]:
    """Put the stand-ins in for the rest of the process. Returns what will be noted of calls that need a GPU."""
    noted: list[tuple[str, Any]] = []
    empty, on_stream = torch.empty, lambda self, on: noted.append(("own_stream", on))

    def on_cpu(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **options | ({"device": "cpu"} if options.get("device") == "cuda" else {}))

    torch.empty = on_cpu  # type: ignore[assignment]
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    torch.cuda.Event = Event  # type: ignore[assignment, misc]
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *device: "pretended"
    torch.cuda._sleep = lambda cycles: noted.append(("sleep", cycles))
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        setattr(torch.cuda, name, lambda *device, name=name: noted.append((name, None)))
    for name in ("memory_allocated", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda *device: 0)
    Encoder.own_stream = on_stream  # type: ignore[method-assign, assignment]

    # As many lines, steps and ways as on a GPU, of one shape, each small.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
    common.SHAPES["1.5b"] |= heads | {"num_hidden_layers": 2, "vocab_size": 512}
    common.CEILING_SIZES["cuda"], common.FLUSHED = (64, 1 << 10), 1 << 10
    wanted, least = gpu_run.SIZES["cuda"], gpu_run.SIZES["cpu"]
    lines = tuple((40 + 8 * i, rows, families) for i, (rows, families) in enumerate(((4, 2), (8, 2), (4, 1))))
    assert (len(lines), len(wanted.scoring[1])) == (len(wanted.decoding[0]), 2)
    gpu_run.SIZES["cuda"] = replace(
        wanted, shapes=("1.5b",), quick=True, repeats=1, decoding=(lines, 2), scoring=((30, 4, 4), (1, 2)),
        host=((4,), 4, 1), searching=least.searching,
    )  # fmt: skip
    # Whether a family is served exactly is asked in tests of its own.
    language_model.admission.check = lambda module, *_: 2 * 2 * 64 * 2  # type: ignore[attr-defined]
    common.Machine.here = classmethod(lambda cls: cls(Cuda(), "pretended", 1))  # type: ignore[method-assign, assignment]
    return noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    calls = pretend()
    gc.freeze()  # each measurement collects garbage first, of which what was imported is none
    for table in TABLES:
        gpu_run.measure(table, Path(sys.argv[1]))
    gpu_run.append(Path(sys.argv[1]), {"calls": sorted({f"{name} {value}" for name, value in calls})})
