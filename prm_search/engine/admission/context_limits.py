"""Limits on a path's length and on the KV to hold, by what a model's config and its machine say."""

from __future__ import annotations

from typing import Any

import torch

DEFAULT_BYTES = 4 << 30  # of KV a model on a CPU
SHARE = 3  # the first of a policy and a pair must leave room for the other two, weights and all
RESERVE = 0.1  # of a GPU's memory, for activations and what else a forward needs


def context_of(config: Any) -> int | None:
    """Tokens of the longest path a model takes exactly, where its (text) config says so."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    limits = [int(limit)] if limit and limit > 0 else []
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        limits += _rope_limit(part, limits)
    return min(limits, default=None)


def _rope_limit(rope: dict[str, Any], context: list[int]) -> list[int]:
    """Tokens up to which rotary frequencies do not depend on how long the longest path of a forward is."""
    kind = str(rope.get("rope_type", rope.get("type", "")))
    if kind == "longrope" and rope.get("original_max_position_embeddings"):
        return [int(rope["original_max_position_embeddings"])]
    # Frequencies of a longer sequence outlive it, until one shorter than the original context resets them.
    return [min(context) - 1] if "dynamic" in kind and context else []


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes free and in all on a CUDA device; None for any other."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def default_capacity(device: torch.device, width: int, promised: int = 0) -> int:
    """Tokens of KV to hold: what DEFAULT_BYTES hold on a CPU, or a third of what a GPU has left.

    Args:
        device: where they go.
        width: bytes of KV that a token takes.
        promised: bytes that other models on the device may still take. Pools are made with the first forward, so what
            is promised counts as free until then.
    """
    budget = DEFAULT_BYTES
    if (memory := device_memory(device)) is not None:
        free, whole = memory
        budget = max(0, free - promised - int(RESERVE * whole)) // SHARE
    return max(1024, min(budget // max(1, width), 1 << 20))
