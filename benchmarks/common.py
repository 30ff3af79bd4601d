"""Shared parts of the benchmarks: models of a shape, paired timing, where a report goes."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

T = TypeVar("T")

_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
# The small Llama of the CPU figures, SmolLM2-135M, and the shapes of Qwen2.5.
SHAPES: dict[str, dict[str, int]] = {
    name: {**dict(zip(_FIELDS, sizes, strict=True)), "max_position_embeddings": 32768}
    for name, sizes in {
        "small": (8000, 256, 688, 6, 8, 4, False),
        "smollm2": (49152, 576, 1536, 30, 9, 3, True),
        "0.5b": (151936, 896, 4864, 24, 14, 2, True),
        "1.5b": (151936, 1536, 8960, 28, 12, 2, True),
        "7b": (152064, 3584, 18944, 28, 28, 4, False),
    }.items()
}


@dataclass(frozen=True)
class Machine:
    """The machine that a report was made on."""

    device: str
    name: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of models and operands: bf16 on a GPU, fp32 on a CPU."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @classmethod
    def here(cls) -> Machine:
        """This machine: its GPU where it has one, its CPU otherwise."""
        cuda = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if cuda else _cpu()
        versions = {"python": platform.python_version()}
        for package in ("torch", "triton", "transformers", "prm-search"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "absent"
        return cls("cuda" if cuda else "cpu", name, torch.get_num_threads(), versions)


CEILING_SIZES = {"cuda": (8192, 1 << 30), "cpu": (1024, 1 << 26)}  # side of the matmul, bytes of the copy


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings that a floor divides by, taken where the report is made: never a datasheet.

    Attributes:
        flops: floating point operations a second of a plain matmul, in the dtype of `model`.
        bandwidth: bytes a second of a copy within the device's memory, read and written.
    """

    flops: float
    bandwidth: float

    @classmethod
    @functools.cache
    def measure(cls, machine: Machine) -> Ceilings:
        """Measure once a process: the best of many, for a ceiling. Random operands: zeros run faster than models do."""
        side, count = CEILING_SIZES[machine.device]
        a, b = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
        source = torch.randint(256, (count,), dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        times = on_device({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=20)
        return cls(2 * side**3 / min(times["matmul"]), 2 * count / min(times["copy"]))

    def floor(self, flop: float, size: float) -> tuple[float, str]:
        """Seconds that work cannot go below, and what binds it: "flop" or "bytes"."""
        return max((flop / self.flops, "flop"), (size / self.bandwidth, "bytes"))


def _cpu() -> str:
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()}-core {platform.machine()} CPU ({flags})"


def model(shape: str, seed: int, machine: Machine) -> Any:
    """A Llama of a shape with random weights: fp32 on a CPU, bf16 on a GPU."""
    torch.manual_seed(seed)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=machine.dtype).eval()


def weight_bytes(module: Any) -> int:
    """Bytes of the weights that a forward of one token reads: all, but of an untied embedding hardly a row."""
    total = sum(p.numel() * p.element_size() for p in module.parameters())
    embedding = module.get_input_embeddings().weight
    return total if module.config.tie_word_embeddings else total - embedding.numel() * embedding.element_size()


def token_bytes(shape: str, size: int = 2) -> int:
    """Bytes of KV that a token of a shape takes in one model, `size` bytes a number."""
    sizes = SHAPES[shape]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * head * size


def sync() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(
    runs: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1, collect: bool = True
) -> dict[str, list[float]]:
    """Wall seconds of each run, taken in turn so that a drifting machine drifts for all.

    Args:
        runs: name -> what to time.
        repeats: timed rounds; `warmup` more go before.
        collect: free cyclic garbage before each run, which takes longer than a single op does.

    Returns:
        name -> [repeats] seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warmup, repeats):
        for name, run in runs.items():
            if collect:
                gc.collect()
            sync()
            begin = time.perf_counter()
            run()
            sync()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


FLUSHED = 1 << 30  # bytes, more than any L2 holds


def process_seconds(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Process seconds of each run, taken in turn; one round goes before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, pairs):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            if turn >= 0:
                seconds[name].append(time.process_time() - begin)
    return seconds


HELD_CYCLES = 1_000_000  # of the device's clock, about half a millisecond


def on_device(runs: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """`paired` for single ops: on a GPU by CUDA events, with a cold L2, without the host's time to launch.

    A searcher waits for the host too, so whole steps are timed by `paired`; what a kernel takes is this. The L2 is
    flushed by a fill, and the device then waits until the host has queued the op's launches: a clock that starts before
    they are there would count the host's time.
    """
    if not torch.cuda.is_available():
        return paired(runs, repeats, warmup=1, collect=False)
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warmup, repeats):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(HELD_CYCLES)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return seconds


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def weighed(run: Callable[[], T]) -> tuple[T, int | None]:
    """Return what a run returns, and the most bytes the GPU held beyond what it held before; None on a CPU."""
    if not torch.cuda.is_available():
        return run(), None
    gc.collect()
    sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    sync()
    return result, torch.cuda.max_memory_allocated() - before


def memory(run: Callable[[], Any]) -> dict[str, int]:
    """Bytes that an op needs beyond its operands, its result included.

    Returns:
        On a GPU {"peak_bytes": of the allocator}; on a CPU, which keeps no such count, {"largest_tensor_bytes": of any
        operation's result}, a lower bound of the same.
    """
    _, peak = weighed(run)
    if peak is not None:
        return {"peak_bytes": peak}
    with _Largest() as seen:
        run()
    return {"largest_tensor_bytes": seen.bytes}


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the pairwise ratios of two rows of `paired`."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
