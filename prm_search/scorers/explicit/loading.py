"""Published step PRMs by hub id or path: which format it is, its body, its head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any, NamedTuple

from torch import Tensor

from ...engine.language_model import LanguageModel
from ...models.checkpoint import Checkpoint
from ...models.heads import read_tensors, tensor_files
from ...models.loading import hub_options, load
from .formats import FORMATS, PRMFormat

# Parts of names of checkpoints whose classes and tensors do not tell their format.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "reasonflux": ("reasonflux-prm",),
    "math_shepherd": ("math-shepherd", "math_shepherd"),
    "math_psa": ("math-psa", "math_psa"),
    "er_prm": ("er-prm", "llama3.1-math-prm"),
    "versaprm": ("versaprm",),
    "rlhflow": ("prm-mistral-data", "prm-deepseek-data"),
    "granite": ("granite-3.3-8b-lora-math-prm", "lora-math-prm"),
    "pure": ("pure-prm",),
    "universal": ("universal-prm",),
    "trl_blank_line": ("math-7b-instruct-prm-0.", "math-1.5b-instruct-prm-0."),
}


class StepPRMParts(NamedTuple):
    """The parts of a StepPRM."""

    lm: LanguageModel
    tokenizer: Any
    format: PRMFormat
    tensors: dict[str, Tensor]


def load_parts(
    model: str | PathLike[str], format: PRMFormat | None, capacity: int | None, options: Mapping[str, Any]
) -> StepPRMParts:
    """Load what StepPRM.from_pretrained says. Arguments and errors as there; None finds the format out."""
    named = dict(options)
    source = Checkpoint.of(model, named.get("revision"))
    hub = hub_options(named)
    adapter = source.file("adapter_config.json", hub) is not None
    files = {} if adapter else tensor_files(source, hub)
    if format is None:
        format = FORMATS[guess(source, files, hub)]
    wanted = [name for name in files if name.startswith(format.reading.prefixes)] if format.reading.prefixes else []
    loaded = load(source, capacity=capacity, heads=tuple(format.reading.prefixes), **named)
    if loaded.tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {source.name!r}: pass tokenizer=")
    return StepPRMParts(loaded.lm, loaded.tokenizer, format, read_tensors(files, wanted))


def guess(source: Checkpoint, tensors: Collection[str], hub: Mapping[str, Any]) -> str:
    """Return the name of the format that a checkpoint has by its class, its tensors and its name.

    Raises:
        ValueError: none or several fit; they are said.
    """
    name = source.name.lower()
    by_name = [known for known, parts in _NAMES.items() if any(part in name for part in parts)]
    two_layers = {"score.0.weight", "score.2.weight"} <= set(tensors)
    if "v_head.summary.weight" in tensors:
        return "skywork"
    if two_layers:
        return "reasonflux" if "reasonflux" in by_name else "qwen_math"
    if "score.weight" in tensors:
        fits = [known for known in by_name if known in ("trl_blank_line", "pure", "universal")]
        choice = ["trl", "trl_blank_line", "pure", "universal"]
    else:
        fits = [known for known in by_name if not FORMATS[known].reading.prefixes]
        choice = [known for known, one in FORMATS.items() if not one.reading.prefixes]
    if len(fits) == 1:
        return fits[0]
    what = "a score head" if "score.weight" in tensors else "no head of its own"
    raise ValueError(
        f"{source.name!r} has {what}, which does not tell its format: pass format=, one of {', '.join(choice)}"
        + (" (an outcome model scores whole answers, not steps)" if "score.weight" in tensors else "")
    )
