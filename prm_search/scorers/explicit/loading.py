"""Published step PRMs by hub id or path: which format it is, its body, its head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

from torch import Tensor

from ...engine.language_model import LanguageModel
from ...files import parse_json
from ...models.checkpoint import Checkpoint
from ...models.heads import read_tensors, tensor_files
from ...models.loading import hub_options, load
from ..kinds import OUTCOME, PAIR
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
    model: str | PathLike[str],
    format: PRMFormat | None,
    adapter: str | PathLike[str] | None,
    capacity: int | None,
    options: Mapping[str, Any],
) -> StepPRMParts:
    """Load what StepPRM.from_pretrained says. Arguments and errors as there; a format of None is found out."""
    named = dict(options)
    revision, gguf_file = named.pop("revision", None), named.pop("gguf_file", None)
    source = Checkpoint.of(model, revision, gguf_file)
    hub = hub_options(named)
    body = source  # where the head's tensors are
    if adapter is not None:
        if "base" in named:
            raise ValueError(f"adapter={adapter!r} sits on the model that is named first: leave out base=")
        source, named["base"] = Checkpoint.of(adapter), source
    files = {} if _bare(body, hub) else tensor_files(body, hub)
    if format is None:
        format = FORMATS[look(source.name, files, architectures(body, hub)).only()]
    wanted = [name for name in files if name.startswith(format.reading.prefixes)] if format.reading.prefixes else []
    loaded = load(source, capacity=capacity, heads=tuple(format.reading.prefixes), **named)
    if loaded.tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {source.name!r}: pass tokenizer=")
    return StepPRMParts(loaded.lm, loaded.tokenizer, format, read_tensors(files, wanted))


def _bare(source: Checkpoint, hub: Mapping[str, Any]) -> bool:
    """Return True if a checkpoint has no file of tensors to find a head in: an adapter, or a GGUF file."""
    return source.gguf_file is not None or source.file("adapter_config.json", hub) is not None


@dataclass(frozen=True)
class Look:
    """A look at a checkpoint without loading it.

    Attributes:
        name: of the checkpoint.
        head: what is said of its head.
        fits: formats that class, tensors and name tell.
        choice: formats that it could be.
        beside: other kinds of reward models that it could be; see kinds.KINDS.
    """

    name: str
    head: str
    fits: Sequence[str]
    choice: Sequence[str]
    beside: Sequence[str] = ()

    def only(self, *, beside: bool = False) -> str:
        """Return the one format that it has.

        Args:
            beside: name the other kinds too, where a caller takes them.

        Raises:
            ValueError: none or several fit; they are said.
        """
        if len(self.fits) == 1:
            return self.fits[0]
        names = [*self.choice, *(self.beside if beside else ())]
        note = " (an outcome model scores whole answers, not steps)" if OUTCOME in self.beside and not beside else ""
        raise ValueError(
            f"{self.name!r} has {self.head}, which does not tell its format: pass format=, one of "
            + (", ".join(names) or "no step PRM's")
            + note
        )


def looked_at(source: Checkpoint, hub: Mapping[str, Any]) -> Look:
    """Look at a checkpoint's class, tensors and name.

    Args:
        source: the checkpoint.
        hub: how its files are fetched.

    Raises:
        OSError: there are no weights.
    """
    return look(source.name, {} if _bare(source, hub) else tensor_files(source, hub), architectures(source, hub))


def architectures(source: Checkpoint, hub: Mapping[str, Any]) -> list[str]:
    """Return the names of classes that a checkpoint's config has; none where it has no config."""
    path = None if source.gguf_file is not None else source.file("config.json", hub)
    if path is None:
        return []
    with open(path, "rb") as file:
        config = parse_json(file.read(), path)
    names = config.get("architectures") if isinstance(config, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def look(name: str, tensors: Collection[str], classes: Sequence[str] = ()) -> Look:
    """Tell formats by the name of a checkpoint, the names of its tensors and of its classes."""
    lower = name.lower()
    by_name = [known for known, parts in _NAMES.items() if any(part in lower for part in parts)]
    if "v_head.summary.weight" in tensors:
        return Look(name, "a value head", ["skywork"], ["skywork"])
    if {"score.0.weight", "score.2.weight"} <= set(tensors):
        return Look(name, "a head of two layers", ["reasonflux" if "reasonflux" in by_name else "qwen_math"], [])
    if "score.weight" in tensors:
        if any("ForTokenClassification" in one for one in classes):
            choice, beside = ["trl", "trl_blank_line", "pure"], []
        elif any("ForSequenceClassification" in one for one in classes):
            choice, beside = ["universal"], [OUTCOME]
        else:
            choice, beside = ["trl", "trl_blank_line", "pure", "universal"], [OUTCOME]
        return Look(name, "a score head", [known for known in by_name if known in choice], choice, beside)
    headless = [known for known, one in FORMATS.items() if not one.reading.prefixes]
    return Look(name, "no head of its own", [known for known in by_name if known in headless], headless, [PAIR])
