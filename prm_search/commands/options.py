"""Options that commands share, and what is made of them. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..driver.budget import Budget
from ..driver.guidance_file import read_guidance, read_values
from ..files import parse_json
from ..models.placement import DEMO, shipped
from ..scorers.kinds import KINDS
from ..steps import StepRule
from ..strategies import STRATEGIES, Strategy, named_strategy, resolve_strategy
from . import BadInput
from .config import SECTIONS

# Panels of --help. Rare options stand in the last one.
MODELS, PROMPTS, DATA, LABELS, STEPS, OUTPUT = "Models", "Prompts", "Data", "Labels", "Steps", "Output"
SEARCH, CHOICE, SAMPLING, ADVANCED = "Search", "Choice of the answer", "Sampling", "Advanced"

POLICY_HELP = (
    "The model that samples: hub id, folder, PEFT adapter, .gguf file, 'demo', or openai:MODEL behind a server."
)
URL_HELP = (
    "With --policy openai:MODEL: the server, up to /v1. Default: OPENAI_BASE_URL, else OpenAI's. Key: OPENAI_API_KEY."
)
OPTIONS_HELP = "Arguments of vllm.LLM (--engine vllm), or of OpenAIPolicy (--policy openai:...), as a JSON object."
SCORER_HELP = "A step PRM, outcome model or pair: hub id or folder; or a JSON file that names an ensemble."
FORMAT_HELP = f"With --scorer: what it is, of {', '.join(KINDS)}."
PAIR_HELP = "Folder or hub id with a pair card (pair.json), or 'demo'."
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def check_models(pair: str | None, prm: str | None, reference: str | None, *, needed: bool) -> None:
    """Return True if --pair, --prm and --reference say one pair. Raises BadInput where they do not.

    Args:
        pair, prm, reference: as given.
        needed: there must be one.
    """
    if pair is not None and (prm is not None or reference is not None):
        raise BadInput("--pair names both models: give it, or --prm and --reference")
    if reference is not None and prm is None:
        raise BadInput("--reference needs --prm beside it")
    if needed and pair is None and prm is None:
        raise BadInput("a pair is needed: --pair, or --prm and --reference (--scorer for other reward models)")


def check_scorer(scorer: str | None, prm_format: str | None) -> None:
    """Check --scorer and --prm-format. Raises BadInput where the format is unknown, or of nothing."""
    if prm_format is not None:
        one_of("--prm-format", prm_format, KINDS)
        if scorer is None:
            raise BadInput("--prm-format needs --scorer beside it")


def one_of(option: str, word: str, allowed: Sequence[str]) -> Any:
    """The word, if it is allowed. Raises BadInput naming the option otherwise."""
    if word not in allowed:
        raise BadInput(f"{option} {word!r} is unknown; it is one of {', '.join(allowed)}")
    return word


def at_least(option: str, value: int, least: int = 1, most: int = (1 << 31) - 1) -> int:
    """The number, if it is from `least` to `most`. Raises BadInput naming the option otherwise."""
    if value < least:
        raise BadInput(f"{option} {value}: at least {least} is needed")
    if value > most:
        raise BadInput(f"{option} {value}: at most {most:,} is allowed")
    return value


def listed(text: str) -> list[str]:
    """The words of "a,b,c"."""
    return [word.strip() for word in text.split(",")]


def numbers(option: str, text: str) -> list[int]:
    """The integers of "1,4,16". Raises BadInput naming the option where there are others."""
    try:
        return [int(word) for word in listed(text)]
    except ValueError as error:
        raise BadInput(f"{option} {text!r:.80}: integers with commas between them are needed") from error


def engine_options(engine: str, text: str | None, *, endpoint: bool = False) -> dict[str, Any]:
    """Arguments for the engine of the policy. Raises BadInput for an unknown engine, or for what is no JSON object.

    Args:
        engine, text: as given.
        endpoint: the policy is behind a server.
    """
    one_of("--engine", engine, ("hf", "vllm"))
    if endpoint and engine != "hf":
        raise BadInput(f"--engine {engine}: --policy openai:MODEL runs behind its server; leave it out")
    if text is None:
        return {}
    if engine != "vllm" and not endpoint:
        raise BadInput("--engine-options needs --engine vllm, or --policy openai:MODEL")
    try:
        arguments = parse_json(text, "--engine-options")
    except ValueError as error:
        raise BadInput(f"--engine-options {text!r:.80} is no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise BadInput(f'--engine-options {text!r}: a JSON object is needed, as {{"gpu_memory_utilization": 0.5}}')
    return arguments


def make_strategy(name: str, values: Mapping[str, Any]) -> Strategy:
    """The named strategy, configured by those options that were given (not None).

    Args:
        name: with "-" or "_"; or a JSON object with "name" and any fields of the strategy, as in a file of --config.
        values: option -> value.

    Raises:
        BadInput: an option that this strategy does not have, or one that stands in both.
        ValueError: no strategy of that name, or a number is out of range.
    """
    fields = parse_json(name, "--strategy") if name.lstrip().startswith("{") else {"name": name}
    key = str(fields.pop("name", None)).replace("-", "_")
    resolve_strategy(key)
    own = [declared.name for declared in dataclasses.fields(STRATEGIES[key])]  # type: ignore[arg-type]
    chosen = {option: value for option, value in values.items() if value is not None}
    for option in chosen:
        if option not in own:
            takes = ", ".join(_flag(field_name) for field_name in own if field_name in values)
            raise BadInput(f"{_flag(option)} is not an option of --strategy {key}; it takes {takes}")
    for field in fields:
        if field not in own or field in chosen:
            raise BadInput(f"--strategy: {field} is {'given twice' if field in chosen else f'no field of {key}'}")
    return named_strategy({"name": key, **chosen, **fields})


@contextmanager
def named(flags: Mapping[str, str]) -> Iterator[None]:
    """Let a refusal of the library name the option that was typed.

    Args:
        flags: argument -> option.

    Raises:
        BadInput: a ValueError or TypeError says "argument=..."; the option stands before it.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        named_argument = re.match(r"(?:\w+: )?(\w+)=", str(error))
        flag = flags.get(named_argument[1]) if named_argument else None
        if flag is None:
            raise
        raise BadInput(f"{flag}: {error}") from error


def make_steps(
    delimiter: Sequence[str] | None,
    max_tokens: int | None,
    regex: str | None,
    *,
    default: str | Sequence[str] | None = None,
    confidence: float | None = None,
    confidence_of: str = "top",
) -> StepRule:
    r"""A StepRule from options; a backslash and n in a delimiter is a line feed.

    Args:
        delimiter, max_tokens, regex, confidence, confidence_of: as given; None for the default, and max_tokens=0 for no
            limit.
        default: the delimiter where neither one nor a regex was given; None for StepRule's own.

    Raises:
        ValueError: see StepRule.
    """
    rule = StepRule()
    ends: str | Sequence[str] | None = rule.delimiter if default is None else default
    if delimiter:
        ends = [unescape(text) for text in delimiter]
    elif regex is not None:
        ends = None
    tokens = rule.max_tokens if max_tokens is None else None if max_tokens == 0 else max_tokens
    with named({argument: _flag(option) for argument, option in SECTIONS["steps"].items()}):
        return StepRule(
            delimiter=ends, max_tokens=tokens, regex=regex, confidence=confidence,
            confidence_of=confidence_of,  # type: ignore[arg-type]
        )  # fmt: skip


def make_budget(tokens: int | None, nodes: int | None, depth: int | None, seconds: float | None) -> Budget:
    """A Budget from options. Raises ValueError as Budget does."""
    with named({argument: _flag(option) for argument, option in SECTIONS["budget"].items()}):
        return Budget(tokens=tokens, nodes=nodes, depth=depth, seconds=seconds)


def guidance_content(path: str | None) -> dict[str, Any] | None:
    """The content of a guidance file, checked; None for none. Raises BadInput where it cannot be read or makes no
    sense."""
    if path is None:
        return None
    try:
        read_guidance(path)
        content: dict[str, Any] = read_values(path)
    except OSError as error:
        raise BadInput(f"--guidance {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"--guidance {error}") from error
    return content


def card_delimiter(pair: str | None) -> str | None:
    """The delimiter that the card of a pair names, in a folder or on the hub; None without one. Raises BadInput for a
    bad card."""
    from ..scorers.implicit.card import card_delimiter as read

    try:
        return None if pair is None else read(shipped() if pair == DEMO else pair)
    except ValueError as error:
        raise BadInput(f"--pair {pair}: its card cannot be read: {error}") from error


def pair_card(pair: str) -> dict[str, Any] | None:
    """The card of a pair, in a folder or on the hub; None without one."""
    from ..scorers.implicit.card import find_card

    try:
        return find_card(shipped() if pair == DEMO else pair)[1]
    except (OSError, ValueError):
        return None


def unescape(text: str) -> str:
    r"""Backslash escapes (\n, \t, \r, \\) as a shell passes them."""
    characters, rest = [], iter(text)
    for char in rest:
        if char != "\\":
            characters.append(char)
            continue
        after = next(rest, "")
        characters.append({"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}.get(after, "\\" + after))
    return "".join(characters)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
