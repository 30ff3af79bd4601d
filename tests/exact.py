"""Llama checkpoints that compute in float64 throughout: what they sample is the same on every machine.

A sampled token, or a count of them, may hang on the last bits of a number, and those differ between processors, threads
and batch shapes. In float64 those bits are about a billion times smaller, and decide nothing in practice.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from prm_search.models import loading


class ExactNorm(LlamaRMSNorm):
    """LlamaRMSNorm without its rounding to float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class ExactRotary(LlamaRotaryEmbedding):
    """LlamaRotaryEmbedding of the default kind, with frequencies and angles in float64."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = 2 * self.inv_freq.shape[0]
        powers = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = position_ids[..., None].double() / self.config.rope_parameters["rope_theta"] ** powers
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def exact(model: Any) -> Any:
    """The model itself, computing in float64 from now on.

    Raises:
        ValueError: it is no Llama with default rotary embeddings.
    """
    rotary = [module for module in model.modules() if isinstance(module, LlamaRotaryEmbedding)]
    if not rotary or any(module.rope_type != "default" for module in rotary):
        raise ValueError(f"{type(model).__name__} is not a Llama with default rotary embeddings")
    for module in model.double().modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = ExactNorm
        elif isinstance(module, LlamaRotaryEmbedding):
            module.__class__ = ExactRotary
    return model


@contextmanager
def exact_loading() -> Iterator[None]:
    """Every Llama checkpoint loaded meanwhile is exact, and is shared with none loaded before or after."""
    plain = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **options: Any) -> Any:
        made = plain(*args, **options)
        if isinstance(made, tuple):  # with its loading info
            return exact(made[0]), *made[1:]
        return exact(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
        patch.setattr(loading, "_modules", weakref.WeakValueDictionary())
        yield
