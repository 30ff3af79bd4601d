"""`--config FILE`: options of a command from YAML or JSON. What the command line says wins over the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import parse_json, parse_yaml
from . import BadInput
from .records import reason

ENDINGS = (".yaml", ".yml", ".json")
#: Keys of the library's own configs that stand in an object of their own, and the options that they are.
SECTIONS: dict[str, dict[str, str]] = {
    "steps": {
        "delimiter": "delimiter", "max_tokens": "step_tokens", "regex": "step_regex", "confidence": "step_confidence",
        "confidence_of": "step_confidence_of",
    },
    "budget": {
        "tokens": "budget", "nodes": "budget_nodes", "depth": "budget_depth", "seconds": "budget_seconds"
    },
    "limits": {
        "searches": "max_searches", "body_bytes": "max_body", "max_tokens": "max_tokens", "children": "max_children",
        "sampled_tokens": "max_sampled", "seconds": "timeout", "patterns": "allow_regex",
    },
}  # fmt: skip
ALIASES = {"shapes": "shape"}  # of evaluation.Plan
NEGATED = {"capped": "uncapped"}  # fields whose option says the opposite
OBJECTS = ("strategy", "engine_options", "arguments")  # options that take a JSON object as their text
LISTED = ("strategies", "budgets", "seeds", "values", "search_values", "weights")  # one text, with commas
UNREAD = ("config", "debug", "help")


def _use(context: typer.Context, value: str | None) -> str | None:
    """Make the file's values the defaults of this call. A data set's configuration, as it once was, is taken too."""
    if value is None:
        return None
    options = {option.name: option for option in context.command.params}
    if "data_config" in options and not value.endswith(ENDINGS) and not os.path.isfile(value):
        context.default_map = {"data_config": value}
    else:
        context.default_map = dict(defaults(value, _read(value), options))
    return value


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every command has."""

    config: Annotated[
        str | None,
        typer.Option(
            help="YAML or JSON with options of this command; the command line wins.",
            metavar="FILE",
            is_eager=True,
            callback=_use,
        ),
    ] = None
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False


def defaults(path: str, content: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options that a file gives, by their parameters' names, as a command line would have them.

    A key is a long option's name or its parameter's, with "-" or "_"; or one of `SECTIONS`, with an object of the
    library's own names. null leaves an option at its default.

    Args:
        path: of the file, for messages.
        content: what stands in it.
        options: the command's, by their parameters' names.

    Raises:
        BadInput: a key is unknown or stands in it twice, or a value is of the wrong kind.
    """
    if not isinstance(content, dict):
        raise BadInput(f"{path}: keys and values are needed, got {type(content).__name__}")
    known = _names(options)
    seen: dict[str, str] = {}
    for key, name, value in _flat(path, content, known):
        if name in seen:
            raise BadInput(f"{path}: {key} and {seen[name]} are one option")
        seen[name] = key
        if value is not None:
            yield name, _text(f"{path}: {key}", value, options[name], name)


def _names(options: Mapping[str, Any]) -> dict[str, str]:
    """Return what a key may be called, and the parameter that it stands for."""
    known: dict[str, str] = {}
    for name, option in options.items():
        if name not in UNREAD and getattr(option, "param_type_name", "option") == "option":
            known |= {_key(flag): name for flag in option.opts} | {name: name}
    return known | {alias: name for alias, name in ALIASES.items() if name in known}


def _flat(path: str, content: Mapping[Any, Any], known: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    """Keys as they stand, the parameter of each, and its value."""
    for key, value in content.items():
        section = SECTIONS.get(_key(key), {})
        if isinstance(value, dict) and set(section.values()) & set(known.values()):
            for inner, part in value.items():
                name = section.get(str(inner))
                if name is None or name not in known.values():
                    raise BadInput(f"{path}: {key}.{inner} is unknown; known are {', '.join(section)}")
                unlimited = name == "step_tokens" and part is None
                yield f"{key}.{inner}", name, 0 if unlimited else part
        elif _key(key) == "steps" and "delimiter" in known.values() and isinstance(value, str | list):
            yield str(key), "delimiter", value  # as requests to a server have it
        elif NEGATED.get(_key(key)) in known and isinstance(value, bool):
            yield str(key), NEGATED[_key(key)], not value
        elif _key(key) in known:
            yield str(key), known[_key(key)], value
        else:
            raise BadInput(f"{path}: {key} is unknown; known are {', '.join(sorted(set(known.values())))}")


def _text(where: str, value: Any, option: Any, name: str) -> Any:
    """A value as the command line would have it."""
    if getattr(option, "is_flag", False):
        if not isinstance(value, bool):
            raise BadInput(f"{where} is {value!r:.80}: true or false is needed")
        return value
    if name in OBJECTS and isinstance(value, dict):
        return json.dumps(value)
    if name == "shape" and isinstance(value, dict):
        value = [f"{n}={_pair(where, pair)}" for n, pair in value.items()]
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | float):
            raise BadInput(f"{where} is {part!r:.80}: a text or a number is needed")
    texts = [str(part) for part in parts]
    if getattr(option, "multiple", False):
        return texts
    if isinstance(value, list) and name not in LISTED:
        raise BadInput(f"{where} ({option.opts[0]}) is {value!r:.80}: one value is needed, not a list")
    return ",".join(texts)


def _pair(where: str, value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        raise BadInput(f"{where}: [width, expansions] is needed, got {value!r:.80}")
    return f"{value[0]}x{value[1]}"


def _key(name: object) -> str:
    return str(name).lstrip("-").replace("-", "_")


def _read(path: str) -> Any:
    """Return what a file holds. Raises BadInput that says where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path} cannot be read: {reason(error)}") from error
    if path.endswith(".json"):
        return parse_json(text, path)
    return parse_yaml(text, path)
