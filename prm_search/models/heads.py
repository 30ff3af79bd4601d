"""Tensors beside a model's body, by name: heads that no class of transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin")


def tensor_files(source: Checkpoint, hub: Mapping[str, Any]) -> dict[str, str]:
    """Return where a checkpoint's tensors are: name -> path of the file.

    Raises:
        OSError: there are no weights.
        ValueError: an index is not one.
    """
    for name in _INDEXES:
        path = source.file(name, hub)
        if path is not None:
            try:
                with open(path, encoding="utf-8") as stream:
                    parts: dict[str, str] = json.load(stream)["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not an index of weights: {error}") from error
            files = {part: source.file(part, hub) for part in set(parts.values())}
            lost = sorted(part for part, file in files.items() if file is None)
            if lost:
                raise FileNotFoundError(f"{source.name!r}: {lost[0]!r} is missing, which {name!r} names")
            return {tensor: str(files[part]) for tensor, part in parts.items()}
    for name in _FILES:
        path = source.file(name, hub)
        if path is not None:
            return dict.fromkeys(_names(path), path)
    raise FileNotFoundError(f"there are no weights in {source.name!r}: no {_FILES[0]} or {_FILES[1]}")


def read_tensors(files: Mapping[str, str], names: Sequence[str]) -> dict[str, Tensor]:
    """Read some tensors of a checkpoint.

    Args:
        files: of `tensor_files`.
        names: of the tensors.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    tensors: dict[str, Tensor] = {}
    for path, wanted in by_file.items():
        if path.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, "pt") as stored:
                tensors |= {name: stored.get_tensor(name) for name in wanted}
        else:
            whole = _pickled(path)
            tensors |= {name: whole[name] for name in wanted}
    return tensors


def _names(path: str) -> list[str]:
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, "pt") as stored:
            return list(stored.keys())
    return list(_pickled(path))


def _pickled(path: str) -> dict[str, Tensor]:
    import torch

    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
