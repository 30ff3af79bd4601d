"""The final answer of a response: in a box, behind ####, or its last number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

Answer = Callable[[str], str | None]

_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?"  # a sign, not a minus
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{$]))")


def boxed(text: str) -> str | None:
    """Contents of the last complete `\\boxed{...}` (or `\\fbox`), braces inside balanced; None without one.

    `\\boxed 7` counts too, up to white space or "$". A box that the end of the text cuts off is no answer.
    """
    for match in reversed(list(_BOX.finditer(text))):
        if text[match.end() - 1] != "{":
            bare = re.match(r"[^\s$]+", text[match.end() :])
            if bare:
                return bare[0]
            continue
        depth, at = 1, match.end()
        while at < len(text) and depth:
            if text[at] == "\\":  # an escaped brace is a character
                at += 1
            elif text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            at += 1
        if not depth and (content := text[match.end() : at - 1].strip()):
            return content
    return None


def hashes(text: str) -> str | None:
    """What follows the last "####" on its line (the GSM8K form); None without one or with nothing there."""
    _, mark, rest = text.rpartition("####")
    return (rest.strip(" \t").split("\n", 1)[0].strip() or None) if mark else None


def last_number(text: str) -> str | None:
    """The last number: integer, decimal, thousands commas, a/b, with its sign; None without one."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return found[-1] if found else None


ANSWERS: Mapping[str, Answer] = MappingProxyType({"boxed": boxed, "####": hashes, "number": last_number})


def resolve_answer(answer: str | Answer | None) -> Answer | None:
    """The extractor of that name, the callable itself, or None.

    Raises:
        ValueError: no extractor has this name.
        TypeError: none of these.
    """
    if answer is None:
        return None
    if isinstance(answer, str):
        if answer not in ANSWERS:
            raise ValueError(
                f"answer={answer!r} is unknown; it is one of {sorted(ANSWERS)}, a function of text, or None"
            )
        return ANSWERS[answer]
    if not callable(answer):
        raise TypeError(
            f"answer must be one of {sorted(ANSWERS)}, a function of text, or None, got {type(answer).__name__}"
        )
    return answer
