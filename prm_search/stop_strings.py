"""Strings that end a response, found in the bytes that its tokens spell: over tokens, and over steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string that has completed.

    Attributes:
        length: its bytes.
        behind: bytes of the newest token behind it.
    """

    length: int
    behind: int


class StopMatcher:
    """Finds the first of some strings to complete in a response; of two that complete together, the longer.

    UTF-8 shows characters by their bytes alone, so a string is found however its characters are cut into tokens.

    Args:
        stop: the strings.
        before: bytes of the response so far; what completes in them is not found any more.
    """

    def __init__(self, stop: Sequence[str], before: bytes = b"") -> None:
        self._stop = [string.encode() for string in stop]
        self._keep = max(map(len, self._stop), default=1) - 1
        self._tail = before[len(before) - min(self._keep, len(before)) :]

    def copy(self) -> StopMatcher:
        """An independent matcher in the same state."""
        twin = StopMatcher(())
        twin._stop, twin._keep, twin._tail = self._stop, self._keep, self._tail
        return twin

    def feed(self, data: bytes) -> StopMatch | None:
        """Take the bytes of a token. Return what completes in them."""
        text, old = self._tail + data, len(self._tail)
        ends = [
            (at + len(string), at)
            for string in self._stop
            if (at := text.find(string, max(0, old - len(string) + 1))) >= 0
        ]
        self._tail = text[len(text) - min(self._keep, len(text)) :]
        if not ends:
            return None
        end, start = min(ends)
        return StopMatch(end - start, len(text) - end)


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Stop strings from what users pass: a string, strings, or None.

    Raises:
        TypeError: one is not a string.
        ValueError: one is empty, or no text at all (a lone surrogate).
    """
    if isinstance(stop, bytes) or not isinstance(stop, str | Iterable | None):
        raise TypeError(f"stop={stop!r}: a string, strings or None is needed, not {type(stop).__name__}")
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop={stop!r}: a string, strings or None is needed, not {type(string).__name__}")
        if not string:
            raise ValueError(f"stop={stop!r}: an empty string ends no response")
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"stop={stop!r}: {error}") from error
    return strings
