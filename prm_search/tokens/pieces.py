"""Pieces of text: the bytes of token ids as a tree keeps them, and a text cut into its tokens. No torch."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

POLICY = ""  # names the policy's own vocabulary; a pair's has the pair's name


class Vocabulary(Protocol):
    """The bytes of token ids; `TokenText` has them, and so has a tree that was read from its record."""

    def piece(self, token_id: int, /) -> bytes:
        """Bytes that a token adds to a text."""
        ...


class Pieces:
    """The bytes of a few token ids: those of a tree.

    Args:
        pieces: token id -> bytes.
    """

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = dict(pieces)

    def piece(self, token_id: int, /) -> bytes:
        """Bytes that a token adds to a text; empty for one that is not among them."""
        return self._pieces.get(token_id, b"")

    @classmethod
    def of(cls, vocabulary: Vocabulary, ids: Iterable[int]) -> Pieces:
        """The bytes of these ids alone."""
        return cls({token_id: vocabulary.piece(token_id) for token_id in sorted(set(ids))})

    def record(self) -> dict[str, dict[str, str]]:
        """Plain values, as `read` takes them: "text" of ids that are whole characters, "bytes" in hexadecimal else."""
        text: dict[str, str] = {}
        other: dict[str, str] = {}
        for token_id, piece in self._pieces.items():
            try:
                text[str(token_id)] = piece.decode()
            except UnicodeDecodeError:
                other[str(token_id)] = piece.hex()
        return {"text": text, **({"bytes": other} if other else {})}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Pieces:
        """The pieces of a record. Raises ValueError where an id is no number, or bytes are not hexadecimal."""
        text = {int(token_id): piece.encode("utf-8", "surrogatepass") for token_id, piece in record["text"].items()}
        return cls(text | {int(token_id): bytes.fromhex(piece) for token_id, piece in record.get("bytes", {}).items()})


def text_pieces(token_ids: Sequence[int], piece: Callable[[int], bytes]) -> tuple[str, ...]:
    """The text that each token adds: "" for one that leaves a character unfinished; joined they are the whole text.

    Args:
        token_ids: [T].
        piece: bytes that a token id adds (`TokenText.piece`).
    """
    pieces, rest = [], b""
    for place, token_id in enumerate(token_ids, 1):
        rest += piece(token_id)
        text, used = utf_8_decode(rest, "replace", place == len(token_ids))
        pieces.append(text)
        rest = rest[used:]
    return tuple(pieces)
