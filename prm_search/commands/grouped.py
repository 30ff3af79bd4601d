"""Commands made of groups of options: each group is a frozen dataclass, and an option stands in one of them alone."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, get_args, get_type_hints

from ..checks import characters
from . import BadInput
from .options import ADVANCED

# Options that name files, which may have any bytes in their names.
NAMES = (
    "arguments", "config", "data", "fit", "guidance", "html", "json_path", "labels", "model", "out", "pair", "plot",
    "policy", "prm", "prompts_file", "prover", "reference", "responses", "rollouts", "scorer", "scores", "trees",
    "unlabelled",
)  # fmt: skip


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function that takes groups of options.

    A parameter whose type is a dataclass stands for the fields of that dataclass, each of them one option. The function
    is called with the groups, which check their options as they are made. The panel `ADVANCED` is shown last.

    Args:
        function: its other parameters are options, or the context, as typer knows them.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            options.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        groups[name] = kind = hints[name]
        types = get_type_hints(kind, include_extras=True)
        for field in _fields(kind):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            options.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[field.name]
                )
            )
    options.sort(key=lambda option: _panel(option.annotation) == ADVANCED)

    @wraps(function)
    def command(**arguments: Any) -> None:
        for name, value in arguments.items():
            if name not in NAMES:
                _check_text(name, value)
        made = {
            name: kind(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        function(**made, **arguments)

    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def _check_text(name: str, value: object) -> None:
    """Raises BadInput for a text that was no UTF-8 on the command line."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            try:
                characters(f"--{name.replace('_', '-')} {part!r:.80}", part)
            except ValueError as error:
                raise BadInput(str(error)) from error


def _fields(kind: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a group: its own first, then those of the groups that it adds to."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    order = [name for owner in kind.__mro__ for name in inspect.get_annotations(owner) if name in fields]
    return [fields[name] for name in dict.fromkeys(order)]


def _panel(annotation: Any) -> str | None:
    for extra in get_args(annotation)[1:]:
        panel: str | None = getattr(extra, "rich_help_panel", None)
        if panel is not None:
            return panel
    return None
