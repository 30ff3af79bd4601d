"""Tokenizers: texts as token ids (`encoding`), token ids as bytes of text (`token_text`, `pieces`). No torch."""

from .encoding import TokenizerMatch, encode_prompt, encode_text
from .token_text import Piece, TokenText

__all__ = ["Piece", "TokenText", "TokenizerMatch", "encode_prompt", "encode_text"]
