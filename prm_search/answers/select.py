"""The choice among a search's candidates: best, majority, or weighted vote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..tree import Node
from .equivalence import equivalent, normalize
from .extract import ANSWERS, Answer, boxed, hashes, last_number, resolve_answer
from .votes import SELECTS, Candidate, Select, Weight, elect

__all__ = [
    "ANSWERS", "SELECTS", "Selection", "Vote", "boxed", "equivalent", "hashes", "last_number", "normalize",
    "resolve_answer", "select",
]  # fmt: skip


@dataclass(frozen=True)
class Vote:
    """The joint votes and weight of the candidates with one answer.

    Attributes:
        answer: as its best node spells it (the whole text where no extractor was given).
        votes: candidates, merged duplicates counted.
        weight: their weights' sum; equals votes in a majority vote.
        node: the one with the best value, the first of equals.
    """

    answer: str
    votes: int
    weight: float
    node: Node


@dataclass(frozen=True)
class Selection:
    """The choice that `select` made.

    Attributes:
        node: the winner.
        answer: its answer; None without an extractor, or where it finds none.
        votes: the answers that were voted for, winner first; empty for "best".
        abstained: votes not cast, because no answer was found.
        fallback: why "best" was used instead of the vote that was asked for; None where it was not.
    """

    node: Node
    answer: str | None
    votes: tuple[Vote, ...] = ()
    abstained: int = 0
    fallback: str | None = None


def select(
    candidates: Sequence[Node],
    how: Select = "best",
    *,
    answer: str | Answer | None = None,
    weight: Weight = "softmax",
    temperature: float = 1.0,
) -> Selection:
    """Choose among finished nodes.

    "best": the highest value (best-of-N), the first of equals.
    "majority": the answer with most votes; of equals the one with the better best node.
    "weighted": the answer with the largest sum of weights, over its candidates i with value v_i:
        softmax: w_i = exp(v_i / temperature) / sum_j exp(v_j / temperature). With v = q and temperature = beta, w is
            the density ratio pi_phi / pi_ref, self-normalised: samples of the reference vote as samples of the
            PRM would (derived from q's definition, arXiv 2412.01981, eq. 2).
        sigmoid: w_i = 1 / (1 + exp(-v_i / temperature)), the weight of the released evaluation of arXiv 2412.01981:
            the probability of being right, for pairs trained with cross entropy on such labels.
        Where every candidate has a `Node.weight`, which a ParticleFilter gives, those are the weights.

    A node casts `count` votes, one for each merged duplicate, and is represented in the result by the best node of its
    answer. Answers are the same where `equivalent` says so of the first that came up. A candidate without an answer,
    such as one cut by its length, does not vote. If all candidates are without an answer, "best" decides and `fallback`
    says so.

    Args:
        candidates: nodes with a value, each the end of a response; one that is listed twice is one candidate.
        how: see above.
        answer: "boxed", "####", "number", or a function from a response's text to its answer or None; None to vote on
            whole texts, which are then the same only if equal but for white space around them.
        weight: see above.
        temperature: > 0, in the unit of the values (beta * nats, for q).

    Raises:
        ValueError: no candidates, one without a value or with NaN, or an argument out of range.
        TypeError: answer, or what it returns, is of the wrong type.
    """
    extract = resolve_answer(answer)
    nodes = list({id(node): node for node in candidates}.values())
    # "best" needs the winner's answer alone
    answers = [None if how == "best" else answer_of(extract, node) for node in nodes]
    records = [
        Candidate(extracted, _value(node), node.count, node.weight)
        for node, extracted in zip(nodes, answers, strict=True)
    ]
    chosen = elect(records, how, weight=weight, temperature=temperature, literal=extract is None)
    winner = nodes[chosen.place]
    votes = tuple(Vote(b.answer, b.votes, b.weight, nodes[b.place]) for b in chosen.ballots)
    if extract is None or chosen.fallback is not None:
        return Selection(winner, None, votes, chosen.abstained, chosen.fallback)
    return Selection(winner, votes[0].answer if votes else answer_of(extract, winner), votes, chosen.abstained)


def _value(node: Node) -> float:
    if node.value is None or math.isnan(node.value):
        raise ValueError(f"candidate {node!r} has value {node.value}; score it and set its value before selecting")
    return node.value


def answer_of(extract: Answer | None, node: Node) -> str | None:
    """Return what a node's path votes for: the answer found in its text, or all of that without an extractor."""
    if extract is None:
        return node.path_text().strip() or None
    extracted = extract(node.path_text())
    if extracted is not None and not isinstance(extracted, str):
        raise TypeError(f"answer: the function must return a str or None, it returned {type(extracted).__name__}")
    return extracted or None
