"""The weights that a module stands for: its plain base weights, or those with PEFT adapters switched on.

A LoRA pair is one module in two adapter states. The state is switched for the time of one forward, under the
module's lock, and put back; it is never part of a model's own state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

AUTO = "auto"


def unwrap(module: Any) -> Any:
    """The transformers model inside torch.compile, PEFT and DDP wrappers.

    Raises:
        ValueError: a PEFT method that adds virtual tokens (prompt learning), which changes positions.
    """
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif hasattr(module, "get_base_model") and hasattr(module, "peft_config"):
            for name, config in module.peft_config.items():
                refuse_kind(f"adapter {name!r}", config)
            module = module.get_base_model()
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def refuse_kind(name: str, config: Any) -> None:
    """Refuse what is not a matter of the module's weights alone.

    Args:
        name: of the adapter, for the message.
        config: its PeftConfig.

    Raises:
        ValueError: prompt learning, or an adapter that is switched on by tokens of the text (aLoRA).
    """
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"{name} adds virtual tokens ({config.peft_type}); only weight adapters are served")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{name} is an activated LoRA (alora_invocation_tokens): PEFT's wrapper switches it on after those tokens, "
            "outside the model's layers; only adapters that hold for the whole text are served"
        )


def wrapper_of(module: Any) -> Any:
    """The PeftModel around or in what the user passed, or None."""
    while hasattr(module, "_orig_mod") or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module if hasattr(module, "get_base_model") and hasattr(module, "peft_config") else None


@contextmanager
def activated(wrapper: Any, state: tuple[str, ...]) -> Iterator[None]:
    """Let a PeftModel's own forward be that of these adapters; their layers are switched by `switched`."""
    before = wrapper.active_adapter
    wrapper.active_adapter = state[0]
    try:
        yield
    finally:
        wrapper.active_adapter = before


def tuner_layers(module: Any) -> list[Any]:
    """The adapter layers injected into a module."""
    return [m for m in module.modules() if hasattr(m, "_disable_adapters") and hasattr(m, "_active_adapter")]


def adapter_state(module: Any, adapter: str | None) -> tuple[str, ...] | None:
    """The adapters a model part runs with: None for the base weights.

    Args:
        module: the module as the user passed it, wrappers and all.
        adapter: "auto", an adapter's name, or None for the base weights.

    Raises:
        ValueError: the adapter does not exist, other adapters are merged in place, or a bare module carries injected
            adapters and it is not said whether they are meant.
    """
    layers = tuner_layers(unwrap(module))
    if adapter is None:
        refuse_merged(layers, None)
    if adapter is None or not layers:
        if adapter not in (None, AUTO):
            raise ValueError(f"adapter={adapter!r}: the model has no adapters")
        return None
    names = sorted({name for layer in layers for name in _names(layer)})
    if adapter != AUTO:
        if adapter not in names:
            raise ValueError(f"adapter={adapter!r} is not loaded; the model has {names}")
        refuse_merged(layers, (adapter,))
        return (adapter,)
    inner = module
    while hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod
    if not hasattr(inner, "peft_config") or not hasattr(inner, "get_base_model"):
        raise ValueError(
            f"the model carries injected adapters {names}: pass the PeftModel, or say which weights are meant "
            "(adapter=None for the base weights, adapter='name' for an adapter's)"
        )
    active = inner.active_adapters
    state = tuple(active() if callable(active) else active)
    refuse_merged(layers, state)
    return state


def refuse_merged(layers: list[Any], state: tuple[str, ...] | None) -> None:
    """Adapters merged in place are in the base weights, for every state; PEFT would take them out where we run without.

    Raises:
        ValueError: other adapters are merged than the state's own.
    """
    for layer in layers:
        merged = getattr(layer, "merged_adapters", None)
        if merged and (state is None or set(merged) != set(state)):
            raise ValueError(
                f"the adapters {list(merged)} are merged into the base weights, so {_words(state)} cannot be run: "
                "call unmerge_adapter(), or merge_and_unload() for a plain model"
            )


def _words(state: tuple[str, ...] | None) -> str:
    return "the base weights alone" if state is None else f"adapters {list(state)}"


def _names(layer: Any) -> list[str]:
    return [name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute, {})]


@contextmanager
def switched(layers: list[Any], state: tuple[str, ...] | None) -> Iterator[None]:
    """Run with these adapters, or none. Plain attributes are set, so gradients' requires_grad stays as it is.

    Raises:
        ValueError: see `refuse_merged`.
    """
    refuse_merged(layers, state)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = state is None
            if state is not None:
                layer._active_adapter = list(state)
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def device_of(module: Any) -> torch.device:
    """Return where a model takes its input ids; also where its weights are offloaded and only visit the device."""
    embedding = module.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type != "meta":  # asked several times a forward: a module's missing attribute is dear
        return device
    visited = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if visited is None:
        return device
    return torch.device("cuda", visited) if isinstance(visited, int) else torch.device(visited)
