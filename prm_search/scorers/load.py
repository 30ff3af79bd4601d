"""load_scorer: a reward model of any kind by hub id or path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from ..files import parse_json
from .base import ScorerBase
from .kinds import AUTO, OUTCOME, PAIR, check_kind

TooLong = Literal["error", "keep"]


def load_scorer(
    model: str | PathLike[str],
    format: str = AUTO,
    *,
    name: str = "prm",
    capacity: int | None = None,
    too_long: TooLong = "error",
    **options: Any,
) -> ScorerBase:
    """Load a reward model: a pair, a step PRM or an outcome model.

    "auto" takes a checkpoint with a pair card for a pair, and a step PRM by its architecture, its head and its name.
    What could be several things is refused with their names.

    A JSON file stands for an ensemble: {"scorers": [...], "reduce": "lcb", ...}, whose other keys are arguments of
    Ensemble. A member is a hub id or folder, or an object with "model" and arguments of this function; its name is by
    default the last part of the model's, with its place behind it where that is taken.

    Args:
        model: hub id, folder or JSON file.
        format: "auto", a format of StepPRM, "outcome" for an OutcomeRM, or "pair" for an ImplicitPRM.
        name: key of its rewards in Node.rewards.
        capacity: tokens of KV to hold; see LanguageModel.
        too_long: see StepPRM; other kinds have no use for it.
        options: of the `from_pretrained` of what it is: dtype, device_map, revision, tokenizer; adapter (of a step
            PRM); reference and beta (of a pair) ...

    Raises:
        OSError, ImportError: see models.loading.load.
        TypeError: an option is not one of what the model is.
        ValueError: the format is unknown or ambiguous, or the checkpoint does not fit it.
    """
    kind = check_kind("format", format)
    if str(model).endswith(".json"):
        if kind != AUTO:
            raise ValueError(f"format={format!r}: {model} is an ensemble, whose members have formats")
        return _ensemble(str(model), name, capacity, too_long, options)
    if kind == AUTO:
        kind = kind_of(model, options)
    if kind == PAIR:
        from .implicit.implicit_prm import ImplicitPRM

        return ImplicitPRM.from_pretrained(model, name=name, capacity=capacity, **options)
    if kind == OUTCOME:
        from .explicit.outcome_rm import OutcomeRM

        return OutcomeRM.from_pretrained(model, name=name, capacity=capacity, **options)
    from .explicit.step_prm import StepPRM

    return StepPRM.from_pretrained(model, format=kind, name=name, capacity=capacity, too_long=too_long, **options)


def _ensemble(path: str, name: str, capacity: int | None, too_long: TooLong, options: Mapping[str, Any]) -> ScorerBase:
    """The ensemble that a file describes. Raises ValueError that names the file where it makes no sense."""
    from .ensemble import Ensemble

    with open(path, encoding="utf-8") as file:
        content = parse_json(file.read(), path)
    if not isinstance(content, dict) or not isinstance(content.get("scorers"), list):
        raise ValueError(f'{path}: an object with "scorers", a list, is needed')
    members: list[ScorerBase] = []
    for place, entry in enumerate(content["scorers"]):
        own = dict(entry) if isinstance(entry, dict) else {"model": entry}
        model = own.pop("model", None)
        if not isinstance(model, str):
            raise ValueError(f"{path}: scorers[{place}] must be a hub id or folder, or an object with one as its model")
        base = os.path.basename(model.rstrip("/"))
        taken = {name, *(member.name for member in members)}
        shared = {"name": f"{base}-{place}" if base in taken else base, "capacity": capacity, "too_long": too_long}
        members.append(load_scorer(model, **{**shared, **options, **own}))
    try:
        return Ensemble(members, name=name, **{key: value for key, value in content.items() if key != "scorers"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def kind_of(model: str | PathLike[str], options: Mapping[str, Any]) -> str:
    """Return what a checkpoint is: one of kinds.KINDS but "auto".

    Args:
        model: hub id or folder.
        options: for loading; those that say how files are fetched are used.

    Raises:
        OSError: nothing is there.
        ValueError: it could be several things, whose names are said.
    """
    from ..models.loading import hub_options
    from .explicit.loading import looked_at
    from .implicit.card import find_card

    hub = hub_options(options)
    source, card = find_card(model, options.get("revision"), hub=hub)
    if card is not None:
        return PAIR
    return looked_at(source, hub).only(beside=True)
