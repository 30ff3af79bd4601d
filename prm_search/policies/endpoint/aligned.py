"""A server's text cut into the tokens that it tells beside the text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

from .client import ServerToken

UNSPELT = ServerToken(None)
_STUCK = 16  # tokens that wait for text which is there: they spell it in another way
_CHARACTER = 8  # tokens that one character, or a few in a row, may be spread over

Piece = tuple[bytes, ServerToken]


class TokenAligner:
    """Cuts a text, which is the truth, into tokens, whose spelling may lack something.

    Text may come behind its tokens (servers hold it back where it may turn out to be a stop string), and tokens that
    spell a part of a character have no text of their own: the last of them is given the whole character. Where tokens
    spell nothing of the text (a vocabulary's own marks), the text is spread over them.
    """

    def __init__(self) -> None:
        self._tokens: deque[ServerToken] = deque()
        self._text = b""
        self._spelt = True

    def feed(self, text: str, tokens: Iterable[ServerToken]) -> None:
        """Take what the server adds."""
        self._text += text.encode("utf-8", "replace")
        self._tokens.extend(tokens)

    def take(self, last: bool = False) -> list[Piece]:
        """Return the tokens whose text is settled, each with its bytes; with `last` all of them.

        Text that is left over at the end is a piece of its own, of an unknown token.
        """
        pieces: list[Piece] = []
        while self._tokens:
            count, size = self._next() if self._spelt else (len(self._tokens), len(self._text))
            if not count and self._text and (last or len(self._tokens) >= _STUCK):
                self._spelt = self._spelt and last
                count, size = len(self._tokens), len(self._text)
            elif not count and last:
                count = len(self._tokens)
            if not count or (not self._spelt and not size and not last):
                break
            pieces += self._cut(count, size)
        if last and self._text:
            pieces.append((self._text, UNSPELT))
            self._text = b""
        return pieces

    def _next(self) -> tuple[int, int]:
        """Tokens, and bytes of the text, that belong together at the front; (0, 0) where that is not settled."""
        joined: bytes | None = b""
        for count, token in enumerate(list(self._tokens)[:_CHARACTER], start=1):
            joined = None if joined is None or token.data is None else joined + token.data
            if joined is not None:
                if self._text.startswith(joined) and _whole(joined):
                    return count, len(joined)
                bare = joined.removeprefix(b" ")  # servers strip the space before a text's first word
                if bare and count == 1 and bare != joined and self._text.startswith(bare) and _whole(bare):
                    return 1, len(bare)
            elif count > 1 and token.data and _whole(token.data):
                at = self._text.find(token.data)
                if 0 < at <= 4 * (count - 1):
                    return count - 1, at
        return 0, 0

    def _cut(self, count: int, size: int) -> list[Piece]:
        data, self._text = self._text[:size], self._text[size:]
        tokens = [self._tokens.popleft() for _ in range(count)]
        known = b"".join(token.data or b"" for token in tokens)
        if count == 1 and data and len(data) < len(known) and known.startswith(data):
            return [(data, UNSPELT)]  # a stop string ended the text inside the token
        if count > 1 and (known == data or any(token.data is None for token in tokens)) and len(data) <= 4 * count:
            parts = [b""] * (count - 1) + [data]  # one character, or a few, over several tokens
        else:
            parts = spread(data.decode("utf-8", "replace"), count)
        return list(zip(parts, tokens, strict=True))


def _whole(data: bytes) -> bool:
    """Return True if bytes are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def spread(text: str, count: int, ends: Sequence[int] = ()) -> list[bytes]:
    """Cut a text into about so many pieces, as even as can be.

    Args:
        text: the text.
        count: pieces, >= 1. More come where there are more `ends`; some are empty where there are fewer characters.
        ends: rising places at which a piece has to end, each in (0, len(text)].
    """
    bounds = [*ends, *([len(text)] if not ends or ends[-1] < len(text) else [])]
    sizes = [bound - start for start, bound in zip([0, *bounds], bounds, strict=False)]
    total, spare = max(sum(sizes), 1), max(count - len(sizes), 0)
    exact = [size * spare / total for size in sizes]
    shares = [1 + int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda place: int(exact[place]) - exact[place])
    for place in order[: spare - sum(map(int, exact))]:
        shares[place] += 1
    pieces, start = [], 0
    for size, share in zip(sizes, shares, strict=True):
        cuts = [start + round(k * size / share) for k in range(share + 1)]
        pieces += [text[a:b].encode("utf-8", "replace") for a, b in pairwise(cuts)]
        start += size
    return pieces
