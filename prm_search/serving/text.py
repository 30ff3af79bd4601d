"""The text of a response as it grows, so that its pieces joined are the whole, and stop strings that end it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from ..tokens import TokenText


class TextStream:
    """Turns token ids into text, whatever the portions they come in.

    A character whose tokens come in two portions is told with its last one, and text that may turn out to be the
    beginning of a stop string is held back. What `feed` and `end` return, joined, depends on the ids alone.

    Args:
        token_text: bytes of token ids; special tokens have no text.
        stop: strings of which the first to be completed ends the text before it.
        keep: it ends the text behind it instead.

    Attributes:
        stopped_by: the stop string that has ended the text; None where none has.
    """

    def __init__(self, token_text: TokenText, stop: Sequence[str] = (), *, keep: bool = False) -> None:
        self._token_text = token_text
        self._stop, self._keep = stop, keep
        self.stopped_by: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these further ids settle."""
        return self._take(self._decoder.decode(self._bytes(ids)), last=False)

    def end(self) -> str:
        """The rest of the text."""
        return self._take(self._decoder.decode(b"", final=True), last=True)

    @property
    def stopped(self) -> bool:
        """Return True if a stop string has ended the text."""
        return self.stopped_by is not None

    def _bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._token_text.piece(i) for i in ids if i not in self._token_text.special])

    def _take(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        matches = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if matches:
            end, start = min(matches)
            self.stopped_by = held[start:end]
            return held[: end if self._keep else start]
        keep = 0 if last else max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def whole_text(token_text: TokenText, ids: Iterable[int], stop: Sequence[str] = ()) -> str:
    """The text of a complete response, as TextStream tells it."""
    stream = TextStream(token_text, stop)
    return stream.feed(ids) + stream.end()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which `stop` begins, without being all of it."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)
