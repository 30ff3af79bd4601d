"""Problems of the package reasoning-gym, and its own verdict on an answer to one. No torch.

A source `reasoning_gym:TASK?size=200&seed=0&OPTION=VALUE` names a task and its options. The reference answer of its
17th problem is the source with `#17` behind it: it stands in records as any other answer does, and whoever reads it
makes the same problem again. So a response is judged by the task, which may accept many answers, and not by spelling.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from .extract import boxed, hashes

PREFIX = "reasoning_gym:"
_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def is_source(text: str) -> bool:
    """Return True for the name of a task, or of a problem of one."""
    return text.startswith(PREFIX)


def rows(source: str) -> Iterator[dict[str, Any]]:
    """Yield the problems of a task: "question", "answer" (its name, which `score` reads) and "id".

    Raises:
        ValueError: reasoning-gym has no such task, or the task has no such option or value.
        ImportError: reasoning-gym is not installed.
    """
    canonical, task, options = parse(source)
    dataset = _dataset(canonical)
    for place in range(options["size"]):
        yield {
            "question": dataset[place]["question"], "answer": f"{canonical}#{place}", "id": f"{task}-{place}"
        }  # fmt: skip


def parse(source: str) -> tuple[str, str, dict[str, Any]]:
    """Return a source in its one spelling, its task and its options.

    Raises:
        ValueError: no task, an option that is given twice or has no value, or a size that is no integer >= 1.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    options: dict[str, Any] = {"size": 200, "seed": 0}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"{source}: options are NAME=VALUE, joined by &: {error}") from error
    if not task:
        raise ValueError(f"{source}: a task is needed, as in {PREFIX}leg_counting?size=200")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{source}: an option is given twice")
    options.update((name, _value(value)) for name, value in pairs)
    for name, least in (("size", 1), ("seed", 0)):
        if not isinstance(options[name], int) or isinstance(options[name], bool) or options[name] < least:
            raise ValueError(f"{source}: {name} must be an integer >= {least}, got {options[name]!r}")
    return f"{PREFIX}{task}?{urlencode(sorted(options.items()))}", task, options


def answer_to(text: str) -> str | None:
    """Return a response's final answer: in <answer> tags, else in a box or behind ####, else all of it."""
    tagged = _TAG.findall(text)
    return (tagged[-1] if tagged else boxed(text) or hashes(text) or text.strip()) or None


def score(reference: str, answer: str | None) -> float:
    """Return the task's verdict on an answer, 0 to 1; 1 is right.

    Args:
        reference: name of the problem, `reasoning_gym:TASK?...#17`.
        answer: of a response; None scores 0.

    Raises:
        ValueError: the name is no problem's.
        ImportError: reasoning-gym is not installed.
    """
    source, mark, place = reference.rpartition("#")
    canonical, _, options = parse(source)
    if not mark or not place.isdecimal() or int(place) >= options["size"]:
        raise ValueError(f"{reference}: names no problem of the task's {options['size']}")
    if answer is None:
        return 0.0
    dataset = _dataset(canonical)
    return float(dataset.score_answer(answer, dataset[int(place)]))


def _value(text: str) -> Any:
    """A number, a tuple or the like where the text is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@lru_cache(maxsize=32)
def _dataset(canonical: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(f"{canonical} needs the package reasoning-gym: pip install 'prm-search[gym]'") from error
    _, task, options = parse(canonical)
    if task not in DATASETS:
        from difflib import get_close_matches

        near = get_close_matches(task, DATASETS, n=5, cutoff=0.5)
        raise ValueError(f"reasoning-gym has no task {task!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    try:
        return reasoning_gym.create_dataset(task, **options)
    except (TypeError, ValueError, AssertionError) as error:  # its configurations check themselves by assert
        raise ValueError(f"{canonical}: {error or 'the task refuses these options'}") from error
