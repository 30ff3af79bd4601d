"""Adapters for other libraries. Each module is imported on first use."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["huggingface", "vllm"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return list(__all__)
