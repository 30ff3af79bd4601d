"""Tiny random models of the families, and what a plain transformers forward says of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 96


def _config(kind: str, **fields: Any) -> Callable[[], PreTrainedConfig]:
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: getattr(transformers, kind)(**{**base, **fields})


GQA = {"num_key_value_heads": 2}
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("LlamaConfig", **GQA),
    "llama-yarn": _config(
        "LlamaConfig",
        **GQA,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24,
        },
    ),
    "qwen2": _config("Qwen2Config", **GQA),
    "qwen3": _config("Qwen3Config", **GQA, head_dim=16),
    "mistral-window": _config("MistralConfig", **GQA, sliding_window=11),
    "gemma2": _config(
        "Gemma2Config",
        **GQA,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=9,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3": _config(
        "Gemma3TextConfig", **GQA, num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=20, sliding_window=9,
        layer_types=MIXED,
    ),
    "phi3": _config("Phi3Config", **GQA),
    "olmo2": _config("Olmo2Config", **GQA),
    "gpt-neox": _config("GPTNeoXConfig", rotary_pct=0.5),
    "gpt2": _config("GPT2Config", n_inner=48),
    "granite": _config(
        "GraniteConfig", **GQA, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.7,
        attention_multiplier=0.4,
    ),
    "hyperclovax": _config("HyperCLOVAXConfig", **GQA, logits_scaling=0.5, attention_multiplier=0.4),
    "cohere": _config("CohereConfig", **GQA, logit_scale=0.4),
    "smollm3": _config("SmolLM3Config", **GQA, num_hidden_layers=3, no_rope_layers=[1, 0, 1]),
    "gpt-oss": _config(
        "GptOssConfig", **GQA, head_dim=16, sliding_window=9, num_local_experts=4, num_experts_per_tok=2,
    ),
    "qwen2-moe": _config(
        "Qwen2MoeConfig", **GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "mixtral": _config("MixtralConfig", **GQA, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": _config(
        "DeepseekV3Config", num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, moe_intermediate_size=16, kv_lora_rank=16, q_lora_rank=20, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=12,
    ),
}  # fmt: skip


def tiny(name: str | PreTrainedConfig = "llama", *, seed: int = 0, attention: str = "eager") -> Any:
    """A model with weights strong enough that a wrong mask shows in every log-prob."""
    config = FAMILIES[name]() if isinstance(name, str) else name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        draw_weights(model)
    return model


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Matrices that keep the scale of what goes through them, embeddings of size 1, a head that tells tokens apart."""
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    for name, weight in model.named_parameters():
        if weight is head:
            weight.normal_(0, 0.5)
        elif weight.ndim < 2:
            weight.add_(0.2 * torch.randn_like(weight))
        elif any(part in name for part in ("embed", ".wte", ".wpe")):
            weight.normal_(0, 1.0)
        else:
            weight.normal_(0, 1.2 / weight.shape[-1] ** 0.5)


@torch.no_grad()
def naive_rows(model: Any, ids: Sequence[int]) -> np.ndarray:
    """[T, V] float64 log-softmax after each token, by one plain forward without cache."""
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def naive_logprobs(model: Any, ids: Sequence[int]) -> np.ndarray:
    """[T] float64 log p(token | the ones before it); NaN for the first."""
    rows = naive_rows(model, ids)
    return np.concatenate(([np.nan], rows[np.arange(len(ids) - 1), list(ids)[1:]]))
