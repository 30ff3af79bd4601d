"""Reads what `generate` hands to a decoding function, and refuses by name what a search cannot honour."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

# Arguments of the forward call that say nothing new of a text prompt, or are looked at here.
_KNOWN = frozenset({
    "attention_mask", "cache", "cache_params", "cache_position", "logits_to_keep", "past_key_values", "position_ids",
    "use_cache",
})  # fmt: skip
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_CONFIDENCE = "ConfidenceCriteria"  # reads the scores of assisted decoding


@dataclass(frozen=True)
class Call:
    """One call of generate.

    Attributes:
        prompts: token ids of each prompt, without padding.
        input_ids: [prompts, width] as generate has them, padding included.
        returned: num_return_sequences.
        room: response tokens of a row, the padded width counted as generate does.
        seconds: what is left of max_time, or None.
        stop_ids: tokens that end a response.
        criteria: the other stopping criteria.
        pad: the padding id, or None.
    """

    prompts: list[list[int]]
    input_ids: torch.Tensor
    returned: int
    room: int
    seconds: float | None
    stop_ids: frozenset[int]
    criteria: list[Any]
    pad: int | None

    @classmethod
    def read(
        cls, model: Any, input_ids: torch.Tensor, criteria: Sequence[Any], config: Any, model_kwargs: Mapping[str, Any]
    ) -> Call:
        """A call from the arguments of a decoding function. Raises ValueError for what is not served."""
        check_model(model)
        _check_config(config)
        _check_kwargs(input_ids, model_kwargs)
        returned = config.num_return_sequences or 1
        rows = input_ids[::returned]
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [config.max_length]
        room = min(lengths) - rows.shape[1]
        if room < 1:
            raise ValueError(
                f"max_length={min(lengths)} leaves no room for a response to padded prompts of {rows.shape[1]} tokens"
            )
        limits = [c.max_time - (time.time() - c.initial_timestamp) for c in criteria if type(c) is MaxTimeCriteria]
        stop_ids = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        handled = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)
        others = [c for c in criteria if type(c) not in handled]
        if any(type(c).__name__ == _CONFIDENCE for c in others):
            raise ValueError(f"stopping_criteria: {_CONFIDENCE} reads scores of assisted decoding, which is not served")
        pad = getattr(config, "_pad_token_tensor", None)
        return cls(
            prompts=_unpadded(rows, model_kwargs, returned),
            input_ids=rows,
            returned=returned,
            room=room,
            seconds=max(1e-9, min(limits)) if limits else None,
            stop_ids=frozenset(int(i) for ids in stop_ids for i in ids.reshape(-1).tolist()),
            criteria=others,
            pad=None if pad is None else int(pad),
        )


def check_model(model: Any) -> None:
    """Raises ValueError for models that have no plain prompt: encoder-decoder ones."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; prm_guidance serves decoder-only language models"
        )


def _check_config(config: Any) -> None:
    if config.num_beams not in (None, 1):
        raise ValueError(
            f"num_beams={config.num_beams} cannot be used with prm_guidance: how many beams are kept is the strategy's "
            "business, such as Beam(width=4)"
        )
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    if mode not in ("sample", "greedy_search"):
        raise ValueError(f"prm_guidance serves sampling and greedy decoding; these arguments ask for {mode!r}")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} cannot be used with prm_guidance, which keeps its "
            "own cache: leave it out, or pass 'dynamic' where the model's generation config sets it"
        )
    for name in _OUTPUTS:
        if getattr(config, name, False):
            raise ValueError(
                f"{name}=True cannot be used with prm_guidance. return_dict_in_generate=True gives `prm`, whose nodes "
                "carry log-probabilities and rewards"
            )
    if getattr(config, "prm_guidance", None) is not None:
        raise ValueError(
            "prm_guidance is set on a generation config, which is deep-copied at each call with every model inside: "
            "pass it to generate instead"
        )


def _check_kwargs(input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise ValueError("inputs_embeds cannot be used with prm_guidance: pass input_ids, the search is over tokens")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name since transformers 5.24, and before
    if cache is not None:
        if type(cache) is not DynamicCache:
            raise ValueError(
                f"past_key_values: a {type(cache).__name__} cannot be used with prm_guidance, which keeps its own cache"
            )
        if cache.get_seq_length():
            raise ValueError(
                f"past_key_values holds {cache.get_seq_length()} tokens: with prm_guidance pass the whole prompt and "
                "no cache"
            )
    for name, value in kwargs.items():
        if value is not None and name not in _KNOWN and not (isinstance(value, bool) and not value):
            raise ValueError(f"{name} cannot be used with prm_guidance: prompts are input_ids and attention_mask alone")


def _unpadded(rows: torch.Tensor, kwargs: Mapping[str, Any], returned: int) -> list[list[int]]:
    """The prompts' token ids. Raises ValueError where mask or positions are not those of left padding."""
    mask = kwargs.get("attention_mask")
    kept = torch.ones_like(rows) if mask is None else mask[::returned].to(rows)
    if kept.shape != rows.shape:
        raise ValueError(f"attention_mask is {list(kept.shape)}; {list(rows.shape)} is needed, as input_ids")
    kept = (kept != 0).long()
    if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1].all()):
        raise ValueError("attention_mask must be zeros and then ones in each row: use padding_side='left'")
    positions = kwargs.get("position_ids")
    if positions is not None:
        natural = kept.cumsum(-1) - 1
        actual = positions[::returned].to(natural) if positions.ndim == 2 else None
        if actual is None or actual.shape != natural.shape or bool(((actual != natural) & (kept == 1)).any()):
            raise ValueError("position_ids other than 0, 1, 2 ... from each prompt's first token cannot be used")
    return [row[row_mask == 1].tolist() for row, row_mask in zip(rows.cpu(), kept.cpu(), strict=True)]
