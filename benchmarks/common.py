"""What every benchmark shares: models of a shape, paired timing, where a report goes."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

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
    """Where a report was made."""

    device: str
    name: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)

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


def _cpu() -> str:
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()}-core {platform.machine()} CPU ({flags})"


def model(shape: str, seed: int, machine: Machine) -> Any:
    """A Llama of a shape with random weights: fp32 on a CPU, bf16 on a GPU."""
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    torch.manual_seed(seed)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype).eval()


def sync() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(runs: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall seconds of each run, taken in turn so that a drifting machine drifts for all.

    Args:
        runs: name -> what to time.
        repeats: timed rounds; `warmup` more go before.

    Returns:
        name -> [repeats] seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warmup, repeats):
        for name, run in runs.items():
            gc.collect()
            sync()
            begin = time.perf_counter()
            run()
            sync()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the pairwise ratios of two rows of `paired`."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
