"""The final answer of a response: in a box, behind ####, or its last number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from .numbers import CORE, plain_characters, value_of

Answer = Callable[[str], str | None]

# The sign of a number is no minus between two: nothing that could be subtracted from stands before it.
_NUMBER = re.compile(rf"(?P<sign>(?<![\w)\]}}])-)?(?:US\$|\\?[$€£¥₹])?(?P<inner>(?<=[$€£¥₹])-)?(?P<core>{CORE})")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{$]))")


def boxed(text: str) -> str | None:
    """Contents of the last complete `\\boxed{...}` (or `\\fbox`), braces inside balanced; None without one.

    `\\boxed 7` counts too, up to white space or "$". A box that the end of the text cuts off does not count.
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
    """Return what follows the last "####" on its line (the GSM8K form); None without one or with nothing there."""
    _, mark, rest = text.rpartition("####")
    return (rest.strip(" \t").split("\n", 1)[0].strip() or None) if mark else None


def last_number(text: str) -> str | None:
    """The last number: an integer, a decimal, thousands with commas, a/b, with its sign; None without one.

    A currency sign goes (`-$5` is -5), and percent signs, units and full stops behind a number are left out. A mixed
    number is a fraction (`2 1/2`: 5/2), LaTeX's fractions are a/b, and `3 x 10^5` is 3e5.
    """
    matches = list(_NUMBER.finditer(plain_characters(text)))
    if not matches:
        return None
    last = matches[-1]
    sign = "-" if last["sign"] or last["inner"] else ""
    return sign + _spelled(last)


def _spelled(match: re.Match[str]) -> str:
    """A number without LaTeX, blanks and times signs; a number that has none of these as it stands."""
    part = match.groupdict()
    if part["whole"] is not None:
        value = value_of(match)
        fraction = f"{part['over'] or part['part']}/{part['under'] or part['of']}"
        return fraction if value is None else f"{value.numerator}/{value.denominator}"
    if part["top"] is not None:
        return f"{part['top']}/{part['bottom']}"
    power = next((part[n] for n in ("braced", "bare", "braced1", "bare1") if part[n] is not None), None)
    return match["core"] if power is None else f"{part['decimal'] or '1'}e{power}"


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
