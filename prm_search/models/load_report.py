"""A comparison of loaded and saved weights: missing ones are refused, and those that the model has no place for.

transformers drops leftover weights without an error: a config with too few layers, or of another variant, loads and
computes something else. Extra heads are legitimate, and told.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# Buffers that older releases saved; they are computed from the config.
_BUFFER = re.compile(r"(^|\.)(inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids|causal_mask)$")
# Parts beside the body, which its next-token probabilities do not go through.
_BESIDE = re.compile(
    r"head|score|reward|value|classif|regress|critic|rank|pool|vision|visual|image|audio|speech|projector|mtp|nextn"
)
_REWARD_HEAD = re.compile(r"(score|v_head|value_head|reward_head)\.")
# What a quantised weight is stored with, and scales of quantised caches.
_STORAGE = re.compile(r"scale|zero|absmax|quant|g_idx|packed|shape")


def check_report(name: str, module: nn.Module, report: Mapping[str, Any], heads: tuple[str, ...] = ()) -> None:
    """Refuse a model of which transformers' loading report says that it is not what was saved.

    Args:
        name, module, heads: as check_leftovers.
        report: what `from_pretrained(output_loading_info=True)` returns beside the model.

    Raises:
        ValueError: weights are missing (transformers fills them with random numbers), or see check_leftovers.
    """
    lacking = sorted(report["missing_keys"])
    if lacking:
        head = next((key for key in sorted(report["unexpected_keys"]) if _REWARD_HEAD.match(key)), None)
        note = (
            f"; {head!r} is a reward model's head, which is no causal LM (StepPRM and OutcomeRM load it; on a command "
            "line --scorer)"
        )
        raise ValueError(
            f"{name!r} is incomplete: {len(lacking)} weights are missing, {lacking[0]!r} among them"
            + ("" if head is None else note)
        )
    check_leftovers(name, module, report["unexpected_keys"], heads)


def check_leftovers(name: str, module: nn.Module, leftover: Iterable[str], heads: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint with weights that the model should have used, and warn of extra heads by name.

    Args:
        name: of the checkpoint, for the message.
        module: what was loaded from it.
        leftover: names of its weights that went nowhere.
        heads: beginnings of the names that the caller reads by itself.

    Raises:
        ValueError: a weight is left over that belongs to the model's body or to its output embedding.
    """
    refused, beside = [], set()
    for weight in sorted(leftover):
        if weight.startswith(heads) or _BUFFER.search(weight):
            continue
        part = _part_beside(module, weight)
        if part is None:
            refused.append(weight)
        else:
            beside.add(part)
    if refused:
        raise ValueError(
            f"{name!r} does not fit its config: {len(refused)} of its weights have no place in "
            f"{type(module).__name__}, {refused[0]!r} among them"
        )
    if beside:
        warnings.warn(
            f"{name!r} has parts that {type(module).__name__} does not use: {', '.join(sorted(beside))}", stacklevel=2
        )


def _part_beside(module: nn.Module, weight: str) -> str | None:
    """The part of a checkpoint that a weight belongs to, where that is not a part of the model itself."""
    here: Any = module
    for place, step in enumerate(names := weight.split(".")):
        inside = getattr(here, step, None) if not step.isdigit() else here._modules.get(step)
        if isinstance(inside, nn.Module):
            here = inside
            continue
        if _STORAGE.search(names[-1]) and getattr(module, "is_quantized", False):
            return "scales of its quantisation"
        body = module, getattr(module, "base_model", None)
        return ".".join(names[: place + 1]) if here in body and not step.isdigit() and _BESIDE.search(step) else None
    return None
