"""The bytes that each token id adds to a text, read off a tokenizer once and cached.

Decoding token by token is wrong: a character may be split over tokens, and decoders glue spaces on by position. Bytes
have neither trouble. The joined pieces of a response are what the response adds to the text before it, wherever the run
of tokens is cut. Step rules match on this text, and `Node.text` shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .private_tokenizer import private_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACED = "\ufffd"  # what decoders show for bytes that are no character

Piece = Callable[[int], bytes]


def _byte_level() -> dict[str, int]:
    """The byte of each character of a byte-level BPE vocabulary (GPT-2's `bytes_to_unicode`, inverted). Printable
    Latin-1 stands for itself; U+0100 and on stand for the 68 other bytes, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class _Cache(dict[int, bytes]):
    """id -> bytes, filled on first use; a hit costs one dict look-up."""

    def __init__(self, make: Callable[[int], bytes]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> bytes:
        made = self[token_id] = self._make(token_id)
        return made


class TokenText:
    """Bytes and text of token ids.

    Args:
        tokenizer: a transformers tokenizer, of either backend, or what has its methods `convert_ids_to_tokens`,
            `decode` and, where it is a fast one, `backend_tokenizer`. Nothing is imported.

    Attributes:
        tokenizer: as given.
        special: ids that are control tokens: `piece` gives their content, `text` leaves them out.
        piece: id -> the bytes that the token adds after other tokens (`piece(id)`). Empty for an id that the vocabulary
            lacks: a model's head is often padded beyond the vocabulary.

    Joined pieces equal `decode(..., clean_up_tokenization_spaces=False)` but at the edge of a text. Decoders of the
    sentencepiece and WordPiece kinds drop the space before a text's first word; the "</w>" kind drops the space after
    its last. A piece keeps that space, since a response goes on after its prompt. Special tokens that are decoded, not
    skipped, may get a space too in tokenizers that join words with one.
    """

    piece: Piece

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        flagged = {int(i) for i, token in added.items() if getattr(token, "special", False)}
        self.special: frozenset[int] = frozenset(flagged | {int(i) for i in tokenizer.all_special_ids})
        self.tokenizer = tokenizer
        self._bytes_of = _of_decoder(tokenizer)
        self._pieces = _Cache(self._read)
        self.piece = self._pieces.__getitem__

    def text(self, ids: Iterable[int]) -> str:
        """The text that these ids add, without special tokens; bytes that are not UTF-8 become U+FFFD.

        A character whose tokens are split over two calls is lost in both: render a whole path in one call where that
        matters.
        """
        return self.text_bytes(ids).decode("utf-8", "replace")

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the text that these ids add, without special tokens. Bytes of two calls join to the whole text."""
        pieces, special = self._pieces, self.special
        return b"".join([pieces[i] for i in ids if i not in special])

    def _read(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative; ids start at 0")
        try:
            token = self.tokenizer.convert_ids_to_tokens(int(token_id))
        except (KeyError, IndexError, OverflowError):
            token = None
        if token is None:
            return b""
        if isinstance(token, bytes):  # tiktoken-like vocabularies
            return token
        if token_id in self.special:
            return token.encode()
        if self._bytes_of is not None:
            return self._bytes_of(token)
        return _by_difference(self.tokenizer, token_id, token)


def _of_decoder(tokenizer: Any) -> Callable[[str], bytes] | None:
    """Bytes of a vocabulary entry, from the tokenizer's decoder; None where it does not work entry by entry."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if backend.decoder is None:
        return lambda token: b" " + token.encode()  # tokenizers joins with spaces
    try:
        state = json.loads(backend.decoder.__getstate__())
    except Exception:  # a decoder written in Python; the library raises no narrower type
        return None
    stages: list[Callable[[str | bytes], str | bytes]] = []
    fused = False
    for spec in state["decoders"] if state["type"] == "Sequence" else [state]:
        kind = spec["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused:
            continue  # acts on the edge of the whole text
        elif fused:
            return None
        else:
            stage = _stage(spec)
            if stage is None:
                return None
            stages.append(stage)
            fused = kind == "ByteLevel"  # gives one string

    def bytes_of(token: str) -> bytes:
        value: str | bytes = token
        for stage in stages:
            value = stage(value)
        return value if isinstance(value, bytes) else value.encode()

    return bytes_of


def _stage(spec: dict[str, Any]) -> Callable[[str | bytes], str | bytes] | None:
    """One decoder of the tokenizers library as it treats an entry that is not a text's first; None if unknown."""
    kind = spec["type"]
    if kind == "ByteLevel":
        return _on_str(_unmap)
    if kind == "ByteFallback":
        return _on_str(lambda token: bytes([int(m[1], 16)]) if (m := _BYTE.fullmatch(token)) else token)
    if kind == "Metaspace":
        mark = spec["replacement"]
        return _on_str(lambda token: token.replace(mark, " "))
    if kind == "Replace" and "String" in spec["pattern"]:
        old, new = spec["pattern"]["String"], spec["content"]
        return _on_str(lambda token: token.replace(old, new))
    if kind == "BPEDecoder":
        suffix = spec["suffix"]
        return _on_str(lambda token: token.replace(suffix, " "))
    if kind == "WordPiece":
        prefix, cleanup = spec["prefix"], spec["cleanup"]

        def word_piece(token: str) -> str:
            token = token[len(prefix) :] if token.startswith(prefix) else " " + token
            if cleanup:  # done by the library entry by entry, so a piece can do it too
                for old, new in _CLEANUP:
                    token = token.replace(old, new)
            return token

        return _on_str(word_piece)
    return None


_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _on_str(act: Callable[[str], str | bytes]) -> Callable[[str | bytes], str | bytes]:
    """Leaves alone what an earlier stage has turned into bytes."""
    return lambda value: value if isinstance(value, bytes) else act(value)


def _unmap(token: str) -> bytes:
    """Bytes of a byte-level entry. One with any character outside the table (an added token) is plain text."""
    try:
        return bytes([_BYTE_LEVEL[c] for c in token])
    except KeyError:
        return token.encode()


def _by_difference(tokenizer: Any, token_id: int, token: str) -> bytes:
    """Return what decoding the id after an anchor adds to decoding the anchor."""
    anchor: Sequence[int] = private_tokenizer(tokenizer).encode("a", add_special_tokens=False)[-1:]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    alone, both = decode(anchor), decode([*anchor, token_id])
    added = both[len(alone) :] if both.startswith(alone) else decode([token_id])
    byte = _BYTE.fullmatch(token)
    if byte and added != token:
        return bytes([int(byte[1], 16)])
    if _REPLACED in added:  # part of a character, in the alphabet of a byte-level vocabulary
        return _unmap(token)
    return added.encode()
