"""guidance.yaml: a search as a file. `prm-search tune` writes it; the command line, a server and PRMGuidance read it.

It has the options of `prm-search generate` and nothing else, so `generate --config guidance.yaml` runs it as it is. Its
`answer` may name a function, "module:function" or "file.py:function", which is imported: read only files that you
trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..answers.functions import function_named
from ..files import parse_json, parse_yaml
from ..steps import StepRule
from ..strategies import Strategy, named_strategy, resolve_strategy
from .budget import Budget
from .search_settings import SearchSettings

#: Which models it was found for; names, as on a command line.
MODELS = ("policy", "pair", "prm", "reference", "beta", "scorer", "prm_format")
#: How tokens are drawn; `generate` and servers read them, PRMGuidance leaves them to its caller.
DRAWS = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")
CHOICE = ("value", "select", "answer", "weight", "weight_temperature")


@dataclass(frozen=True)
class GuidanceFile:
    """The content of a guidance file.

    Attributes:
        strategy: how to search.
        choice: those of value, select, answer, weight and weight_temperature that it names. An answer that is a
            function's name has become the function.
        steps: where a step ends; None where it does not say.
        budget: of a prompt.
        draws: those of temperature, top_p, top_k, min_p and max_new_tokens that it names.
        models: those of policy, pair, prm, reference, beta, scorer and prm_format that it names.
    """

    strategy: Strategy
    choice: Mapping[str, Any] = field(default_factory=dict)
    steps: StepRule | None = None
    budget: Budget = field(default_factory=Budget)
    draws: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> SearchSettings:
        """The settings of a search. Raises ValueError or TypeError, naming the field that is out of range."""
        return SearchSettings.make(
            strategy=self.strategy, steps=self.steps, budget=self.budget, **self.choice, **self.draws
        )


def read_guidance(path: str | PathLike[str]) -> GuidanceFile:
    """Read a guidance file, YAML or (by its ending) JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither; a field is unknown, of the wrong kind or out of range. The message names file and
            field.
    """
    return guidance_of(read_values(path), str(path))


def read_values(path: str | PathLike[str]) -> Any:
    """Return what a YAML or JSON file holds. Raises OSError or ValueError as read_guidance does."""
    where = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from error
    return parse_json(text, where) if where.endswith(".json") else parse_yaml(text, where)


def guidance_of(content: object, where: str) -> GuidanceFile:
    """A GuidanceFile from plain values; `where` is what to call them. Raises ValueError as read_guidance does."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: keys and values are needed, got {type(content).__name__}")
    known = ("strategy", *CHOICE, "steps", "budget", *DRAWS, *MODELS)
    values = {key: value for key, value in content.items() if value is not None}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {key} is unknown; known are {', '.join(known)}")
    if "strategy" not in values:
        raise ValueError(f"{where}: there is no strategy")
    try:
        strategy = values["strategy"]
        guidance = GuidanceFile(
            named_strategy(strategy) if isinstance(strategy, Mapping) else resolve_strategy(strategy),
            {name: _answer(values[name]) if name == "answer" else values[name] for name in CHOICE if name in values},
            _part("steps", StepRule, values.get("steps")),
            _part("budget", Budget, values.get("budget")) or Budget(),
            {name: values[name] for name in DRAWS if name in values},
            {name: values[name] for name in MODELS if name in values},
        )
        guidance.settings()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return guidance


def _answer(value: object) -> object:
    """The function that "module:function" names; another value as it is."""
    if not isinstance(value, str) or ":" not in value:
        return value
    try:
        return function_named(value)
    except ValueError as error:
        raise ValueError(f"answer: {error}") from error


def _part(name: str, kind: Any, value: object) -> Any:
    """A StepRule or a Budget from an object of its fields; None for none."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: an object is needed, got {value!r:.80}")
    own = list(kind.__dataclass_fields__)
    for key in value:
        if key not in own:
            raise ValueError(f"{name}.{key} is unknown; known are {', '.join(own)}")
    return kind(**value)


def within(settings: SearchSettings, limits: Budget) -> SearchSettings:
    """The same with the smaller of its budget and these limits, name by name."""
    own = settings.budget
    smaller = {
        name: min((limit for limit in (getattr(own, name), getattr(limits, name)) if limit is not None), default=None)
        for name in ("tokens", "nodes", "depth", "seconds")
    }
    return replace(settings, budget=Budget(**smaller))
