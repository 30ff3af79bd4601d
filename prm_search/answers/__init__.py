"""The final answer of a path, the equivalence of two answers, votes. No torch."""

from __future__ import annotations

from .select import (
    ANSWERS,
    SELECTS,
    Answer,
    Select,
    Selection,
    Vote,
    boxed,
    equivalent,
    hashes,
    last_number,
    normalize,
    resolve_answer,
    select,
)

__all__ = [
    "ANSWERS", "SELECTS", "Answer", "Select", "Selection", "Vote", "boxed", "equivalent", "hashes", "last_number",
    "normalize", "resolve_answer", "select",
]  # fmt: skip
