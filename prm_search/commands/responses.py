"""Responses that exist already, from files: of `prm-search rollout`, or with all responses of a problem in a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.responses import Answered, Response
from ..files import Distinct
from ..problems import stated_answer
from ..tree import Prompt
from . import BadInput
from .problems import ANSWERS, PROMPTS
from .records import Item, asked_in, json_lines, prompt_of


@dataclass
class _Group:
    where: str
    prompt: Prompt
    answer: str | None
    responses: list[tuple[int, Response]] = field(default_factory=list)


def read_responses(path: str, *, chat: bool = False, system: str | None = None) -> tuple[list[Item], list[Answered]]:
    """Problems with their responses.

    A record is one response (as `rollout` writes them: "response", perhaps "response_ids", "label", "finish", and
    "problem" and "sample" as numbers), or all those of a problem ("responses", perhaps "labels"). The question is
    "prompt_ids", or a field as `read_problems` knows them; so is the right answer, which labels make superfluous.

    Args:
        path: JSON Lines; "-" is standard input.
        chat, system: see prompt_of.

    Returns:
        For each problem an Item, whose digest names question and responses, and the problem.

    Raises:
        BadInput: the file cannot be read, or a record lacks a field or has one of the wrong kind.
        ValueError: a record stands in it twice.
    """
    groups: dict[object, _Group] = {}
    once = Distinct()
    for where, record in json_lines(path):
        once.add(where, record)
        number = record.get("problem")
        numbered = isinstance(number, int) and not isinstance(number, bool)
        prompt = _prompt(where, record, chat, system, numbered)
        key = ("number", number) if numbered else ("prompt", prompt.text, prompt.token_ids, repr(prompt.messages))
        if "responses" in record:
            key = ("line", where)
        group = groups.setdefault(key, _Group(where, prompt, _answer(record)))
        if group.prompt != prompt:
            raise BadInput(f"{where}: problem {number} has another prompt than in {group.where}")
        new_responses = _many(where, record) if "responses" in record else [_one(where, record)]
        place = record.get("sample", len(group.responses))
        if isinstance(place, bool) or not isinstance(place, int):
            raise BadInput(f'{where}: "sample" is {place!r:.80}: the place of the response is needed')
        group.responses += [(place + i, response) for i, response in enumerate(new_responses)]
    if not groups:
        raise BadInput(f"{path} holds no responses")
    items, problems = [], []
    for group in groups.values():
        responses = [response for _, response in sorted(group.responses, key=lambda pair: pair[0])]
        problems.append(Answered(group.prompt, responses, group.answer))
        extra = {
            "responses": [[response.text, response.token_ids, response.right, response.cut] for response in responses]
        }
        items.append(Item(group.where, group.prompt, repr(extra), {}))
    return items, problems


def _prompt(where: str, record: Mapping[str, Any], chat: bool, system: str | None, numbered: bool) -> Prompt:
    fields = [name for name in ("prompt_ids", *PROMPTS) if record.get(name) is not None]
    if numbered:
        fields.remove("problem")
    if len(fields) != 1:
        raise BadInput(f"{where}: one of prompt_ids, {', '.join(PROMPTS)} is needed, got {fields or list(record)}")
    return prompt_of(asked_in(record, fields[0], where), where, chat, system)


def _answer(record: Mapping[str, Any]) -> str | None:
    names = ("reference_answer", *ANSWERS) if "responses" in record else ("reference_answer",)
    stated = next((record[name] for name in names if record.get(name) is not None), None)
    return None if stated is None else stated_answer(str(stated))


def _one(where: str, record: Mapping[str, Any]) -> Response:
    text, ids = record.get("response"), record.get("response_ids")
    return _response(where, text, ids, record.get("label"), record.get("finish") in ("length", "budget", "weak"))


def _many(where: str, record: Mapping[str, Any]) -> list[Response]:
    texts, labels = record["responses"], record.get("labels")
    if not isinstance(texts, list) or not texts:
        raise BadInput(f'{where}: "responses" must be a list of texts, and not empty')
    if labels is None:
        labels = [None] * len(texts)
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise BadInput(f'{where}: "labels" must be a list, one for each of the {len(texts)} responses')
    return [_response(where, text, None, label, False) for text, label in zip(texts, labels, strict=True)]


def _response(where: str, text: object, ids: object, label: object, cut: bool) -> Response:
    if not isinstance(text, str) or (not text and ids is None):
        raise BadInput(f"{where}: a response must be a text, and not empty")
    if ids is not None and not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
        raise BadInput(f'{where}: "response_ids" must be a list of token ids, and not empty')
    if label not in (None, 0, 1):
        raise BadInput(f"{where}: a label is 0 or 1, got {label!r}")
    return Response(text, None if ids is None else tuple(ids), None if label is None else bool(label), cut)
