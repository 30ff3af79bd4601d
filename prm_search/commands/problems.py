"""Problems with known answers: of JSON Lines files, or of data sets by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from ..answers import ANSWERS as EXTRACTORS, verifiers
from ..answers.functions import function_named
from ..problems import LABELS, Judge, Problem, stated_answer
from . import BadInput
from .records import Item, asked_in, json_lines, prompt_of, reason

PROMPTS = ("prompt", "messages", "question", "problem")
ANSWERS = ("answer", "solution")


def read_problems(
    data: str,
    *,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    template: str | None = None,
    chat: bool = False,
    system: str | None = None,
    worked: bool = False,
) -> list[Item]:
    """Problems; an item's response is its reference answer.

    A record has a "prompt", "messages", "question" (GSM8K) or "problem" (MATH), and an "answer" or else a "solution".
    Of a solution in GSM8K's form the answer is what follows "####", of one in MATH's form what is in the box.

    Args:
        data: a JSON Lines file, "-" for standard input, a name for datasets.load_dataset, or a task of reasoning-gym,
            `reasoning_gym:TASK?size=200`.
        config, split: of a data set.
        limit: read so many at most.
        template: a text prompt is put where this has {}.
        chat, system: see prompt_of.
        worked: the response is the whole answer or solution, as the record has it.

    Raises:
        BadInput: data cannot be read or holds none, or a record lacks a field or has one of the wrong kind.
    """
    if template is not None and template.count("{}") != 1:
        raise BadInput(f"--template {template!r}: it needs {{}} once, where the question goes")
    rows = read_rows(data, config=config, split=split, limit=limit)
    items = [_problem(where, record, template, chat, system, worked) for where, record in rows]
    if not items:
        raise BadInput(f"{data} holds no problems")
    return items


def read_rows(
    data: str, *, config: str | None = None, split: str = "train", limit: int | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Records of a JSON Lines file or a data set, each with what to call it; arguments as of read_problems."""
    if verifiers.is_source(data):
        return islice(_tasks(data), limit)
    local = data == "-" or os.path.isfile(data) or data.endswith((".jsonl", ".json"))
    return islice(json_lines(data) if local else _rows(data, config, split), limit)


def encoded(item: Item, policy: Any) -> Problem:
    """A problem with the policy's tokens. Raises BadInput, naming its line, where it is empty or too long."""
    try:
        prompt = item.prompt.with_ids(policy.encode(item.prompt))
    except ValueError as error:
        raise BadInput(f"{item.where}: {reason(error)}") from error
    return Problem(prompt, str(item.response))


@contextmanager
def at_lines(items: Sequence[Item]) -> Iterator[None]:
    """Let a ValueError of the library that names a problem by its place name its line. Raises BadInput then."""
    try:
        yield
    except ValueError as error:
        message = reason(error)
        match = re.match(r"(?:problems|prompts)\[(\d+)\]:? ", message)
        if match is None:
            raise
        raise BadInput(f"{items[int(match[1])].where}: {message[match.end() :]}") from error


def _problem(
    where: str, record: Mapping[str, Any], template: str | None, chat: bool, system: str | None, worked: bool
) -> Item:
    present = [name for name in PROMPTS if record.get(name) is not None]
    if len(present) != 1:
        raise BadInput(f"{where}: one of {', '.join(PROMPTS)} is needed, got {present or list(record)}")
    question = asked_in(record, present[0], where)
    if template is not None:
        if not isinstance(question, str):
            raise BadInput(f"{where}: --template needs a prompt that is a text")
        question = template.replace("{}", question)
    stated = next((record[name] for name in ANSWERS if record.get(name) is not None), None)
    if isinstance(stated, int | float) and not isinstance(stated, bool):
        stated = str(stated)
    if not isinstance(stated, str) or not stated.strip():
        raise BadInput(f'{where}: an "answer" or a "solution" is needed, a text or a number')
    extra = {"id": record["id"]} if "id" in record else {}
    return Item(where, prompt_of(question, where, chat, system), stated if worked else stated_answer(stated), extra)


def _tasks(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for place, row in enumerate(verifiers.rows(source)):
            yield f"{source}, problem {place}", row
    except (ValueError, ImportError) as error:
        raise BadInput(f"--data {reason(error)}") from error


def _rows(name: str, config: str | None, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInput(
            f"{name} is no file; a data set of that name needs the package datasets: pip install 'prm-search[train]'"
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # of the network, the hub, the file formats: each has its own class
        raise BadInput(f"the data set {name} cannot be loaded: {reason(error)}") from error
    for place, row in enumerate(rows):
        yield f"{name} [{split}], row {place}", row


def make_judge(label: str, answer: str | None) -> Judge:
    """A Judge of options. Raises BadInput naming the option where one makes no sense."""
    if label not in LABELS and ":" not in label:
        raise BadInput(f"--label {label!r} is unknown; it is one of {', '.join(LABELS)}, or module:function")
    if answer is not None and answer not in EXTRACTORS and ":" not in answer:
        raise BadInput(f"--answer {answer!r} is unknown; it is one of {', '.join(EXTRACTORS)}, or module:function")
    if answer is not None and label not in LABELS:
        raise BadInput("--answer is not asked where --label is a function")
    return Judge(
        function_of("--label", label) if ":" in label else label,
        answer_of(answer),
    )


def function_of(option: str, source: str) -> Callable[..., Any]:
    """The function that "module:name" or "file.py:name" stands for. Raises BadInput where there is none."""
    try:
        return function_named(source)
    except ValueError as error:
        raise BadInput(f"{option} {error}") from error


def answer_of(answer: str | None) -> Any:
    """The function that `--answer` names, or the name of one of ours. Raises BadInput as function_of."""
    return function_of("--answer", answer) if answer is not None and ":" in answer else answer
