"""A tiny fp32 copy of a model's family: the same code paths, every length limit within reach of a short test.

Faults of an incremental forward hide behind the limits of a config: a window of 4096, attention chunks of 8192, rotary
frequencies that change after the original context. A miniature keeps what the config switches on and shrinks the
sizes, so that a few dozen tokens cross every limit, and its weights are strong enough that a fault shows. Fields are
known by their names; what a name does not tell is left as it is.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 160
FIRST_WORD = 32  # ids below are left to special tokens
CONTEXT = 128  # positions of a miniature: learned tables need rows, and length-dependent RoPE must not switch

HEAD = 16  # head size
RANK = 24
INTERMEDIATE = 32

# Lengths in tokens after which a layer sees or does something else.
_LIMIT = re.compile(
    r"window|chunk_size$|keep_|local_attention|block_size|topk_blocks|index_topk|floor_scale|log_scaling_n_floor|"
    r"original_max|rel_extent|attn_chunk_length|max_distance"
)
_NOT_A_LIMIT = re.compile(r"max_window_layers|pattern|feed_forward|patch|moe|expert|inference")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|model_max_length|context_length)$"
)
# What is no length: the most that a miniature has of it.
_MOST = [
    (re.compile(pattern), most)
    for pattern, most in (
        (r"vocab_size", VOCABULARY),
        (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 8),
        (r"^(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|n_group|num_expert_group)$", 2),
        (r"^(topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", 1),
        (r"intermediate_size|^((decoder|encoder)_)?ffn_dim$|ffn_hidden_size|^dff$|dim_ff|n_inner$", INTERMEDIATE),
        (r"_rank$|^hidden_size_per_layer_input$", RANK),
    )
]
_TOKEN = re.compile(r"_token_ids?$|_token_index$|_index$")
_PERIOD = re.compile(r"(_pattern|_interval|_period|_every_n_layers|_sparse_step|_freq|_group_size)$")
_LAYER_INDICES = re.compile(r"^(mlp_only_layers|moe_layers|full_attn_idxs|hybrid_layer_ids|cross_attention_layers)$")
_MULTIPLIER = re.compile(r"^(logit_scale|logits_scaling|lm_head_multiplier)$")

_HIDDEN = ("hidden_size", "d_model", "n_embd")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def shrink(config: Any, limit: int = 8) -> Any:
    """A copy of a config with its sizes cut down.

    Args:
        config: a transformers config; left as it is.
        limit: windows, chunks and other lengths become limit, limit + 2 ... limit + 8 tokens, each its own.

    Returns:
        a config of the same class, without quantisation, with eager attention and experts.
    """
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    for part in _parts(small):
        _shrink(part, limit)
    small._attn_implementation = "eager"
    if hasattr(small, "_experts_implementation"):
        small._experts_implementation = "eager"
    return small


def build(kind: type[nn.Module], config: Any, seed: int = 0) -> nn.Module:
    """A model with strong random weights, in fp32 on the CPU and in eval mode. torch's RNG state is left as it was.

    Raises:
        Exception: whatever the family's own code raises for a config it does not like.
    """
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        module = kind(config).float().eval()
        strengthen(module)
    return module


def strengthen(module: nn.Module) -> None:
    """Draw weights that make attention sharp and log-probs spread: with small ones a wrong mask hardly shows."""
    for name, weight in module.named_parameters():
        with torch.no_grad():
            if weight.ndim < 2:
                weight.add_(0.2 * torch.randn_like(weight))
            elif "embed" in name or "wte" in name or "wpe" in name or weight is _output(module):
                weight.copy_(torch.randn_like(weight) * (0.5 if weight is _output(module) else 1.0))
            else:
                weight.copy_(torch.randn_like(weight) / math.sqrt(min(weight.shape[-2:])))


def _output(module: nn.Module) -> nn.Parameter | None:
    find: Any = getattr(module, "get_output_embeddings", None)
    return getattr(find(), "weight", None) if find is not None else None


def _parts(config: Any) -> Iterator[Any]:
    """The config and the configs inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def _get(config: Any, names: Sequence[str]) -> Any:
    for name in names:
        if isinstance(vars(config).get(name), int):
            return vars(config)[name]
    return None


def _set(config: Any, names: Sequence[str], value: Any) -> None:
    for name in names:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, value)


def is_limit(name: str) -> bool:
    """Return True if a config's field of this name is a length in tokens at which the model changes what it does."""
    return bool(_LIMIT.search(name)) and not _NOT_A_LIMIT.search(name) and not _POSITIONS.search(name)


def limits(config: Any) -> list[int]:
    """The lengths in tokens that a config's layers change at."""
    own = [v for part in _parts(config) for n, v in vars(part).items() if is_limit(n) and type(v) is int]
    ropes = [v for part in _parts(config) for v in vars(part).values() if isinstance(v, dict)]
    return own + [v for rope in ropes for n, v in rope.items() if type(v) is int and is_limit(n)]


def is_token(name: str) -> bool:
    """Return True if a config's field of this name holds token ids with a meaning."""
    return bool(_TOKEN.search(name))


def _shrink(config: Any, limit: int) -> None:
    own = config.to_dict().get("per_layer_config")  # {"05": {"head_dim": 512}}: what single layers do otherwise
    if own:
        config.per_layer_config = None
    place = _cut_layers(config, own or {})
    _cut_heads(config)
    ropes = [v for v in vars(config).values() if isinstance(v, dict)]
    ropes += [v for rope in ropes for v in rope.values() if isinstance(v, dict)]
    longrope = any(_kind(rope) == "longrope" for rope in ropes)
    specials = changes = 0
    for name, value in list(vars(config).items()):
        if name.startswith("_") or value is None:
            continue
        if is_token(name):
            specials = _lower_tokens(config, name, value, specials)
        elif isinstance(value, dict):
            _shrink_dict(config, value, limit)
        elif _MULTIPLIER.search(name) and isinstance(value, (int, float)):
            setattr(config, name, type(value)(2) if value > 1 else value if value == 1 else 0.5)
        elif name == "original_max_position_embeddings" and longrope:
            setattr(config, name, CONTEXT)
        elif type(value) is int:
            setattr(config, name, _smaller(name, value, limit + 2 * min(changes, 4)))
            changes += is_limit(name)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            setattr(config, name, [_smaller(name, v, limit) for v in value])
    if own:
        kept = {place[int(i)]: settings for i, settings in own.items() if int(i) in place}
        _shrink_dict(config, kept, limit)
        config.per_layer_config = kept


def _smaller(name: str, value: int, limit: int) -> int:
    if is_limit(name):
        return min(value, limit)
    if _POSITIONS.search(name):
        return CONTEXT
    for pattern, most in _MOST:
        if pattern.search(name):
            return min(value, most)
    return value


def _cut_layers(config: Any, own: dict[str, Any]) -> dict[int, int]:
    """Keep one layer of each kind (two of each where the last ones take their keys and values from earlier ones).

    Returns:
        index of each kept layer -> its new index.
    """
    layers = _get(config, _LAYERS)
    if layers is None:
        return {}
    lists = {n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and not n.startswith("__")}
    indices = {n: v for n, v in lists.items() if _LAYER_INDICES.search(n)}
    per_layer = {n: v for n, v in lists.items() if len(v) == layers and n not in indices}
    special = {int(i): repr(settings) for i, settings in own.items()}

    def kind(i: int) -> Any:
        return ([repr(v[i]) for v in per_layer.values()], [i in v for v in indices.values()], special.get(i))

    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    pools = [range(layers - shared), range(layers - shared, layers)]
    kept: list[int] = []
    for pool in pools:
        kinds: list[Any] = []
        for i in pool:
            if kind(i) not in kinds:
                kinds.append(kind(i))
                kept.append(i)
    period = max([2, *(v for n, v in vars(config).items() if _PERIOD.search(n) and type(v) is int and v <= 8)])
    wanted = 2 if per_layer or special else period
    for i in range(layers):
        if len(kept) >= wanted:
            break
        if i not in kept:
            kept.append(i)
    kept = sorted(kept)[:12]
    place = {old: new for new, old in enumerate(kept)}
    for name, value in per_layer.items():
        setattr(config, name, type(value)(value[i] for i in kept))
    for name, value in indices.items():
        setattr(config, name, type(value)(place[i] for i in value if i in place))
    _set(config, _LAYERS, len(kept))
    if shared:
        config.num_kv_shared_layers = sum(i >= layers - shared for i in kept)
    return place


def _cut_heads(config: Any) -> None:
    """Fewer and smaller heads: grouped stay grouped, and hidden size and heads x head size stay equal or unequal."""
    heads, hidden = _get(config, _HEADS), _get(config, _HIDDEN)
    if heads is None or hidden is None:
        return
    kv_heads = _get(config, _KV_HEADS) or heads
    ratio = max(1, heads // max(1, kv_heads))
    few_kv = 1 if kv_heads == 1 else 2
    few = few_kv * min(ratio, 4 if few_kv == 1 else 2)
    own = _get(config, ["head_dim"])
    latent = _get(config, ["qk_rope_head_dim"])
    matches = own is None or latent is not None or own * heads == hidden
    _set(config, _HIDDEN, few * HEAD if matches else few * HEAD + 16)
    _set(config, _HEADS, few)
    _set(config, _KV_HEADS, few_kv)
    if latent is not None:
        nope, value = _get(config, ["qk_nope_head_dim"]), _get(config, ["v_head_dim"])
        config.qk_rope_head_dim = HEAD // 2
        if nope is not None:
            config.qk_nope_head_dim = HEAD
        if value is not None:
            config.v_head_dim = HEAD if value == nope else HEAD - 4
        if _get(config, ["qk_head_dim"]) is not None:
            config.qk_head_dim = HEAD // 2 + (HEAD if nope is not None else 0)
        if own is not None:
            config.head_dim = HEAD // 2 if own == latent else HEAD
    elif own is not None:
        config.head_dim = HEAD
    for name in ("kv_channels", "index_head_dim", "swa_head_dim", "global_head_dim", "v_head_dim"):
        if latent is None or name != "v_head_dim":
            _set(config, [name], HEAD)
    _set(config, ["rotary_dim"], HEAD // 2)
    _set(config, ["index_n_heads", "swa_num_attention_heads"], few)
    _set(config, ["swa_num_key_value_heads"], few_kv)


def _shrink_dict(config: Any, values: dict[Any, Any], limit: int) -> None:
    """RoPE parameters (of each layer kind, too), compression rates and layers' own settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            _shrink_dict(config, value, limit)
        elif name == "original_max_position_embeddings":
            values[name] = CONTEXT if _kind(values) == "longrope" else limit
        elif name == "mrope_section":
            half = _rotary(config, values) // 2
            values[name] = [half - 2 * (half // 3), half // 3, half // 3]
        elif name in ("short_factor", "long_factor"):
            half = _rotary(config, values) // 2
            values[name] = (value * half)[:half]
        elif type(value) is int and (is_limit(str(name)) or str(name).endswith("_attention")) and value > limit:
            values[name] = limit
        elif name in ("head_dim", "global_head_dim") and type(value) is int:
            values[name] = 2 * HEAD


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "")))


def _rotary(config: Any, rope: dict[str, Any]) -> int:
    size = _get(config, ["head_dim"]) or _get(config, _HIDDEN) // _get(config, _HEADS)
    return int(size * (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0))


def _lower_tokens(config: Any, name: str, value: Any, used: int) -> int:
    """Give special tokens ids below FIRST_WORD; equal kinds stay unset or lists."""
    if isinstance(value, bool) or not isinstance(value, (int, list)):
        return used
    new = min(used, FIRST_WORD - 1)
    setattr(config, name, [new] if isinstance(value, list) else new)
    return used + 1


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on configs that nobody wrote."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
