"""Pairs by name: `ImplicitPRM.from_pretrained` and the card, `pair.json`, that makes a folder a pair."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import checks
from ...models.checkpoint import Checkpoint
from ...tokens import TokenizerMatch
from ..pair import BETA

if TYPE_CHECKING:
    from ...engine.language_model import LanguageModel

CARD = "pair.json"
CARD_FORMAT = 1
POLICY = "policy"  # as a reference: the policy of the search


class PairParts(NamedTuple):
    """The parts of a pair.

    Attributes:
        model: the trained LanguageModel.
        reference: as ImplicitPRM takes it; None for the base weights of the model's adapter.
        tokenizer: of both; None where neither has one.
        beta: rewards a nat.
        card: the card that said so, if there is one.
    """

    model: LanguageModel
    reference: Any
    tokenizer: Any
    beta: float
    card: Mapping[str, Any] | None


def resolve(
    model: str | PathLike[str],
    reference: Any = None,
    *,
    beta: float | None = None,
    tokenizer: Any = None,
    base: Any = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    reference_revision: str | None = None,
    reference_gguf_file: str | None = None,
    capacity: int | None = None,
    **options: Any,
) -> PairParts:
    """Load the parts of a pair; see ImplicitPRM.from_pretrained.

    Args:
        model: hub id, folder (checkpoint, PEFT adapter or pair card), or GGUF file of the PRM.
        reference: hub id or path of the reference, or what else ImplicitPRM takes; None for what card or adapter say.
        beta: None for the card's, else 0.05.
        tokenizer: of both models: a tokenizer, or where to load it; None for the PRM's own.
        base, revision, gguf_file: of the PRM; see load.
        reference_revision, reference_gguf_file: the same for a reference that is loaded.
        capacity, options: of both models; see load.

    Raises:
        OSError, ImportError: see load.
        ValueError: the card is not one; the reference is missing, or has another vocabulary; or see load.
    """
    if beta is not None:
        checks.beta("beta", beta)
    from ...models.loading import hub_options, load

    hub = hub_options(options)
    source, card = find_card(model, revision, gguf_file, hub)
    if card is not None:
        reference = _reference(source, card["reference"], hub) if reference is None else reference
        beta = card["beta"] if beta is None else beta
        source = source.below(card["model"])
    trained = load(source, base=base, tokenizer=tokenizer, capacity=capacity, **options)
    tokenizer = trained.tokenizer
    if isinstance(reference, str | PathLike) and reference != POLICY:
        reference = Checkpoint.of(reference, reference_revision, reference_gguf_file)
    if isinstance(reference, Checkpoint):
        other = load(reference, capacity=capacity, **options)
        tokenizer = other.tokenizer if tokenizer is None else tokenizer
        if other.tokenizer is not None and not TokenizerMatch.of(tokenizer, other.tokenizer).tokens:
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
    return PairParts(trained.lm, reference, tokenizer, BETA if beta is None else beta, card)


def read_card(path: str | PathLike[str]) -> dict[str, Any]:
    """A pair card: at least `model` ("." by default), `reference` (None where an adapter's base is it), `beta`, and
    `delimiter` (None where it does not say what ends a step).

    A reference is a folder beside the card ("./policy"), a hub id, a path, or the keyword "policy".

    Raises:
        ValueError: it is no JSON object, of a later format, or one of these fields makes no sense; the path is said.
    """
    try:
        card = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{os.fspath(path)!r} must hold a JSON object, got {type(card).__name__}")
    defaults: dict[str, Any] = {
        "format": CARD_FORMAT, "model": ".", "reference": None, "beta": BETA, "delimiter": None,
    }  # fmt: skip
    card = defaults | card
    kinds: dict[str, tuple[type, ...]] = {
        "format": (int,), "model": (str,), "reference": (str, type(None)), "delimiter": (str, type(None)),
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(card[key], kind):
            raise ValueError(f"{os.fspath(path)!r}: {key}={card[key]!r} is not {kind[0].__name__}")
    if card["format"] > CARD_FORMAT:
        raise ValueError(f"{os.fspath(path)!r} has format {card['format']}; this version reads up to {CARD_FORMAT}")
    try:
        checks.beta("beta", card["beta"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    return card


def find_card(
    model: str | PathLike[str],
    revision: str | None = None,
    gguf_file: str | None = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Checkpoint, dict[str, Any] | None]:
    """Return where a model is, and the card that makes it a pair, if it has one.

    A card on the hub is fetched once and then found among the files that transformers keeps, also without a network.

    Args:
        model: hub id, folder, or GGUF file.
        revision, gguf_file: see Checkpoint.
        hub: how files are fetched; see models.loading.hub_options.

    Raises:
        OSError: nothing is there.
        ValueError: see read_card.
    """
    source = Checkpoint.of(model, revision, gguf_file)
    path = None if source.gguf_file else source.file(CARD, hub)
    return source, None if path is None else read_card(path)


def card_delimiter(model: str | PathLike[str]) -> str | None:
    """Return what ends a step according to a pair's card; None where it has no card, or the card does not say.

    Args:
        model: hub id, folder, or GGUF file; one that is not there has no card.

    Raises:
        ValueError: see read_card.
    """
    try:
        _, card = find_card(model)
    except OSError:
        return None
    return None if card is None else card["delimiter"]


def _reference(card: Checkpoint, reference: str | None, hub: Mapping[str, Any]) -> str | Checkpoint | None:
    """Return what a card's reference means: a folder beside it, "policy", an id or a path.

    A name that begins with a dot is a folder and nothing else. Older cards named folders without one, so there a name
    is a folder where such a folder is.
    """
    if reference is None:
        return None
    folder = card.below(reference)
    if folder.local if card.local else folder.file("config.json", hub) or folder.file("adapter_config.json", hub):
        return folder
    if reference.startswith("."):
        raise ValueError(
            f"reference={reference!r} of {os.path.join(card.name, CARD)!r} is a folder beside the card, and it is not "
            "there: put it back, or pass reference="
        )
    if reference == POLICY:
        warnings.warn(
            f"the card of {card.name!r} names the reference 'policy', and no such folder lies beside it: taken for the "
            "policy of the search (a card means a folder by './policy')",
            UserWarning,
            stacklevel=4,
        )
    return reference
