"""Pairs by name: `ImplicitPRM.from_pretrained` and the card, `pair.json`, that makes a folder a pair."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.checkpoint import Checkpoint
from ...models.loading import hub_options, load
from ..retokenise import TokenizerMatch

if TYPE_CHECKING:
    from .implicit_prm import ImplicitPRM

CARD = "pair.json"
CARD_FORMAT = 1
BETA = 0.05  # what the released pairs were trained with; a card says otherwise


def load_pair(
    model: str | PathLike[str],
    reference: Any = None,
    *,
    beta: float | None = None,
    tokenizer: Any = None,
    name: str = "prm",
    base: Any = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    reference_revision: str | None = None,
    reference_gguf_file: str | None = None,
    capacity: int | None = None,
    eos_token_id: int | None = None,
    pair: type[ImplicitPRM] | None = None,
    **options: Any,
) -> ImplicitPRM:
    """Load a pair: `ImplicitPRM.from_pretrained`.

    A folder or hub repository with a card, `pair.json`, is a pair by itself: the card names model and reference
    (relative to itself where such a folder is there) and beta. A PEFT adapter's reference is its base, adapter off,
    unless another is named. Models that are the same checkpoint are loaded and run once.

    Args:
        model: hub id, folder (checkpoint, PEFT adapter or pair card), or GGUF file of the PRM.
        reference: hub id or path of the reference; "policy" for the policy of the search (a folder of that name is
            "./policy"); a module, HFPolicy or LanguageModel; a ConstantReference; None for what card or adapter say.
        beta: None for the card's, else 0.05.
        tokenizer: of both models: a tokenizer, or where to load it; None for the PRM's own.
        name: of the pair.
        base, revision, gguf_file: of the PRM; see load.
        reference_revision, reference_gguf_file: the same for a reference that is loaded.
        capacity, options: of both models; see load.
        eos_token_id: see ImplicitPRM.
        pair: class of the result.

    Raises:
        OSError, ImportError: see load.
        ValueError: the card is not one; the reference is missing, or has another vocabulary; or see load.

    Warns:
        UserWarning: model and reference are the same checkpoint.
    """
    from .implicit_prm import ImplicitPRM

    hub = hub_options(options)
    source = Checkpoint.of(model, revision, gguf_file)
    found = None if gguf_file else source.file(CARD, hub)
    if found is not None:
        card = read_card(found)
        reference = _beside(source, card["reference"], hub) if reference is None else reference
        beta = card["beta"] if beta is None else beta
        source = source.below(card["model"])
    trained = load(source, base=base, tokenizer=tokenizer, capacity=capacity, **options)
    words = trained.tokenizer
    if isinstance(reference, str | PathLike) and reference != "policy":
        reference = Checkpoint.of(reference, reference_revision, reference_gguf_file)
    if isinstance(reference, Checkpoint):
        other = load(reference, capacity=capacity, **options)
        words = other.tokenizer if words is None else words
        if other.tokenizer is not None and not TokenizerMatch.of(words, other.tokenizer).tokens:
            raise ValueError(
                f"reference={reference.name!r} has another vocabulary than {source.name!r}: the PRM's reference is the "
                "model it was trained from"
            )
        reference = other.lm
    if reference is None and trained.lm.state is None:
        raise ValueError(
            f"reference is missing, and {source.name!r} has no {CARD} and is no adapter: name the model that the PRM "
            "was initialised from"
        )
    return (pair or ImplicitPRM)(
        trained.lm,
        reference,
        tokenizer=words,
        beta=BETA if beta is None else beta,
        name=name,
        capacity=capacity,
        eos_token_id=eos_token_id,
    )


def read_card(path: str | PathLike[str]) -> dict[str, Any]:
    """A pair card: at least `model` ("." by default), `reference` (None where an adapter's base is it) and `beta`.

    Raises:
        ValueError: it is no JSON object, of a later format, or one of these fields makes no sense; the path is said.
    """
    try:
        card = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{os.fspath(path)!r} must hold a JSON object, got {type(card).__name__}")
    defaults: dict[str, Any] = {"format": CARD_FORMAT, "model": ".", "reference": None, "beta": BETA}
    card = defaults | card
    kinds: dict[str, tuple[type, ...]] = {"format": (int,), "model": (str,), "reference": (str, type(None))}
    for key, kind in kinds.items():
        if not isinstance(card[key], kind):
            raise ValueError(f"{os.fspath(path)!r}: {key}={card[key]!r} is not {kind[0].__name__}")
    if card["format"] > CARD_FORMAT:
        raise ValueError(f"{os.fspath(path)!r} has format {card['format']}; this version reads up to {CARD_FORMAT}")
    if isinstance(card["beta"], bool) or not isinstance(card["beta"], int | float) or not card["beta"] > 0:
        raise ValueError(f"{os.fspath(path)!r}: beta={card['beta']!r}: a number > 0 is needed")
    return card


def _beside(card: Checkpoint, reference: str | None, hub: Mapping[str, Any]) -> str | Checkpoint | None:
    """What a card's reference means: a folder beside it if there is one, else "policy", an id or a path."""
    if reference is None:
        return None
    folder = card.below(reference)
    if card.local:
        return folder if folder.local else reference
    found = folder.file("config.json", hub) or folder.file("adapter_config.json", hub)
    return reference if found is None else folder
