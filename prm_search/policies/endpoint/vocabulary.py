"""A vocabulary for servers that give text and no token ids: a number for each piece of text, as it comes."""

from __future__ import annotations

from threading import Lock
from typing import Any

EOS = 0
_BYTES = 256


class TextVocabulary:
    """Numbers pieces of bytes. It stands where a tokenizer does: scorers read a path's text through it.

    0 ends a response, 1 to 256 are the bytes, and further numbers are given out as pieces come. They mean nothing to
    any model: a scorer reads such a path in tokens of its own.
    """

    text_only = True  # a scorer cannot take its numbers for tokens of its model
    eos_token_id = EOS
    all_special_ids = (EOS,)
    chat_template = None

    def __init__(self) -> None:
        self._pieces: list[bytes] = [b"", *(bytes([value]) for value in range(_BYTES))]
        self._ids: dict[bytes, int] = {piece: place for place, piece in enumerate(self._pieces) if place}
        self._lock = Lock()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """A text byte by byte, as tokenizers give it."""
        return {"input_ids": list(self.bytes_ids(text.encode("utf-8", "replace")))}

    def get_vocab(self) -> dict[str, int]:
        """Nothing: it has no token in common with a tokenizer."""
        return {}

    def id_of(self, piece: bytes) -> int:
        """The number of a piece of text, which may be empty."""
        number = self._ids.get(piece)
        if number is None:
            with self._lock:
                number = self._ids.get(piece)
                if number is None:
                    self._pieces.append(piece)
                    number = self._ids[piece] = len(self._pieces) - 1
        return number

    def bytes_ids(self, data: bytes) -> tuple[int, ...]:
        """A text byte by byte: for prompts, which would fill the vocabulary."""
        return tuple(value + 1 for value in data)

    def convert_ids_to_tokens(self, token_id: int) -> bytes | None:
        """Bytes of a number; None for one that has not been given out."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def decode(self, token_ids: int | list[int]) -> str:
        """The text of some numbers."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", "replace")
