"""Votes: which of some candidates wins. On plain records; `select` does it with the nodes of a tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .equivalence import Form, form, same

Select = Literal["best", "majority", "weighted"]
Weight = Literal["softmax", "sigmoid"]
SELECTS: tuple[str, ...] = get_args(Select)
WEIGHTS: tuple[str, ...] = get_args(Weight)


@dataclass(frozen=True)
class Candidate:
    """One response that takes part in a choice.

    Attributes:
        answer: what it votes for; None abstains.
        value: what it is ranked and weighed by.
        count: votes that it casts, one for each merged duplicate.
        weight: its weight in a weighted vote, of all its duplicates together; None leaves it to the value.
    """

    answer: str | None
    value: float
    count: int = 1
    weight: float | None = None


@dataclass(frozen=True)
class Ballot:
    """The joint votes and weight of the candidates with one answer.

    Attributes:
        answer: as its best candidate spells it.
        votes: candidates, merged duplicates counted.
        weight: their weights' sum; equals votes in a majority vote.
        place: of the candidate with the best value, the first of equals.
    """

    answer: str
    votes: int
    weight: float
    place: int


@dataclass(frozen=True)
class Election:
    """The outcome of a choice.

    Attributes:
        place: of the winner among the candidates.
        ballots: the answers that were voted for, winner first; empty for "best".
        abstained: votes not cast, because no answer was found.
        fallback: why "best" was used instead of the vote that was asked for; None where it was not.
    """

    place: int
    ballots: tuple[Ballot, ...] = ()
    abstained: int = 0
    fallback: str | None = None


def elect(
    candidates: Sequence[Candidate],
    how: Select = "best",
    *,
    weight: Weight = "softmax",
    temperature: float = 1.0,
    literal: bool = False,
) -> Election:
    """Choose among candidates; see `select` for the rules.

    Args:
        candidates: at least one.
        how, weight, temperature: as of `select`.
        literal: answers are the same only where they are equal as strings, not where `equivalent` says so.

    Raises:
        ValueError: no candidates, a value is NaN, or an argument is out of range.
    """
    if how not in SELECTS:
        raise ValueError(f"select={how!r} is unknown; it is one of {SELECTS}")
    if weight not in WEIGHTS:
        raise ValueError(f"weight={weight!r} is unknown; it is one of {WEIGHTS}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: a finite number > 0 is needed")
    if not candidates:
        raise ValueError("candidates is empty; there is nothing to select from")
    values = [candidate.value for candidate in candidates]
    if any(map(math.isnan, values)):
        raise ValueError("candidates: a value is NaN")
    best = values.index(max(values))
    if how == "best":
        return Election(best)
    weights = [float(c.count) for c in candidates] if how == "majority" else _weights(candidates, weight, temperature)

    counts: dict[Form, _Count] = {}  # equivalent answers share a count
    distinct: list[_Count] = []
    abstained = 0
    for index, candidate in enumerate(candidates):
        if candidate.answer is None:
            abstained += candidate.count
            continue
        key = Form(candidate.answer, None) if literal else form(candidate.answer)
        count = counts.get(key)
        if count is None:
            if not literal:
                count = next((other for other in distinct if same(other.key, key)), None)
            if count is None:
                count = _Count(key)
                distinct.append(count)
            counts[key] = count
        count.cast(index, candidate, weights[index])
    if not distinct:
        reason = f"none of {len(candidates)} candidates has an answer, so {how!r} fell back to 'best'"
        return Election(best, (), abstained, reason)
    table = [(Ballot(c.answer, c.votes, math.fsum(c.weights), c.place), c.value) for c in distinct]
    table.sort(key=lambda row: (-row[0].weight, -row[1]))  # stable: the first of equals stays first
    return Election(table[0][0].place, tuple(ballot for ballot, _ in table), abstained)


class _Count:
    """Votes for one answer while they are counted."""

    place: int
    answer: str

    def __init__(self, key: Form) -> None:
        self.key = key
        self.votes = 0
        self.weights: list[float] = []
        self.value = -math.inf

    def cast(self, index: int, candidate: Candidate, weight: float) -> None:
        if not self.votes or candidate.value > self.value:
            self.place, self.answer, self.value = index, str(candidate.answer), candidate.value
        self.votes += candidate.count
        self.weights.append(weight)


def _weights(candidates: Sequence[Candidate], weight: Weight, temperature: float) -> list[float]:
    """Weight of each candidate, its duplicates together; safe for any size of value, infinities included."""
    own = [candidate.weight for candidate in candidates if candidate.weight is not None]
    if len(own) == len(candidates):
        return own
    if weight == "sigmoid":
        return [candidate.count * _sigmoid(candidate.value / temperature) for candidate in candidates]
    top = max(candidate.value for candidate in candidates)
    exponentials = [1.0 if c.value == top else math.exp((c.value - top) / temperature) for c in candidates]
    total = math.fsum(w * c.count for w, c in zip(exponentials, candidates, strict=True))
    return [w / total * c.count for w, c in zip(exponentials, candidates, strict=True)]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
