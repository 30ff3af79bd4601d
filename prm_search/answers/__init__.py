"""The final answer of a path, the equivalence of two answers, votes. No torch."""

from __future__ import annotations

from .equivalence import equivalent, normalize
from .extract import ANSWERS, Answer, boxed, hashes, last_number, resolve_answer
from .select import Selection, Vote, select
from .votes import SELECTS, Candidate, Election, Select, Weight, elect

__all__ = [
    "ANSWERS", "SELECTS", "Answer", "Candidate", "Election", "Select", "Selection", "Vote", "Weight", "boxed", "elect",
    "equivalent", "hashes", "last_number", "normalize", "resolve_answer", "select",
]  # fmt: skip
