"""Log-probabilities of the tokens of a choice, in OpenAI's two shapes."""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..tokens import TokenText
from ..tree import Node


class TokenLogprobs:
    """The tokens of one response as they are told, with the policy's raw log-probabilities (nats, before temperature).

    A token is told with the text that it begins in; the last ones, which may have none, at the end. Those that begin
    behind a stop string are left out, as the string is.

    Args:
        token_text: bytes of token ids.
        kind: "chat" or "text": the shape.
    """

    def __init__(self, token_text: TokenText, kind: Literal["chat", "text"]) -> None:
        self._token_text, self._kind = token_text, kind
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._written = 0  # characters that the tokens so far spell
        self._waiting: deque[tuple[int, bytes, float | None]] = deque()  # first character, bytes, log-probability

    def feed(self, steps: Iterable[Node]) -> None:
        """Take further steps."""
        for node in steps:
            logprobs: Sequence[float | None] = [None] * len(node.token_ids)
            if node.logprobs is not None:
                logprobs = [float(value) if math.isfinite(value) else None for value in node.logprobs]
            for token, logprob in zip(node.token_ids, logprobs, strict=True):
                piece = self._token_text.piece(token)
                self._waiting.append((self._written, piece, logprob))
                if token not in self._token_text.special:
                    self._written += len(self._decoder.decode(piece))

    def told(self, characters: int | None) -> dict[str, Any] | None:
        """Return the entries of tokens that begin before so many characters of the text (None: all); None for none."""
        tokens = []
        while self._waiting and (characters is None or self._waiting[0][0] < characters):
            tokens.append(self._waiting.popleft())
        if not tokens:
            return None
        texts = [piece.decode("utf-8", "replace") for _, piece, _ in tokens]
        if self._kind == "chat":
            content = [
                {"token": text, "logprob": logprob, "bytes": list(piece), "top_logprobs": []}
                for text, (_, piece, logprob) in zip(texts, tokens, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": texts,
            "token_logprobs": [logprob for *_, logprob in tokens],
            "top_logprobs": None,
            "text_offset": [start for start, *_ in tokens],
        }
