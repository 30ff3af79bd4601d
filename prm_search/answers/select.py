"""The final answer of a response, and which of a search's candidates wins: best, majority, or weighted vote."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from ..tree import Node
from .equivalence import equivalent, normalize, same_keys

__all__ = [
    "ANSWERS", "SELECTS", "Selection", "Vote", "boxed", "equivalent", "hashes", "last_number", "normalize",
    "resolve_answer", "select",
]  # fmt: skip

Answer = Callable[[str], str | None]
Select = Literal["best", "majority", "weighted"]
SELECTS: tuple[str, ...] = get_args(Select)

_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?"  # a sign, not a minus
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{$]))")


def boxed(text: str) -> str | None:
    """Contents of the last complete `\\boxed{...}` (or `\\fbox`), braces inside balanced; None without one.

    `\\boxed 7` counts too, up to white space or "$". A box that the end of the text cuts off is no answer.
    """
    for match in reversed(list(_BOX.finditer(text))):
        if text[match.end() - 1] != "{":
            bare = re.match(r"[^\s$]+", text[match.end() :])
            if bare:
                return bare[0]
            continue
        depth, at = 1, match.end()
        while at < len(text) and depth:
            if text[at] == "\\":  # an escaped brace is a character
                at += 1
            elif text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            at += 1
        if not depth and (content := text[match.end() : at - 1].strip()):
            return content
    return None


def hashes(text: str) -> str | None:
    """What follows the last "####" on its line (the GSM8K form); None without one or with nothing there."""
    _, mark, rest = text.rpartition("####")
    return (rest.strip(" \t").split("\n", 1)[0].strip() or None) if mark else None


def last_number(text: str) -> str | None:
    """The last number: integer, decimal, thousands commas, a/b, with its sign; None without one."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return found[-1] if found else None


ANSWERS: Mapping[str, Answer] = MappingProxyType({"boxed": boxed, "####": hashes, "number": last_number})


def resolve_answer(answer: str | Answer | None) -> Answer | None:
    """The extractor of that name, the callable itself, or None.

    Raises:
        ValueError: no extractor has this name.
        TypeError: none of these.
    """
    if answer is None:
        return None
    if isinstance(answer, str):
        if answer not in ANSWERS:
            raise ValueError(
                f"answer={answer!r} is unknown; it is one of {sorted(ANSWERS)}, a function of text, or None"
            )
        return ANSWERS[answer]
    if not callable(answer):
        raise TypeError(
            f"answer must be one of {sorted(ANSWERS)}, a function of text, or None, got {type(answer).__name__}"
        )
    return answer


@dataclass(frozen=True)
class Vote:
    """What the candidates with one answer have together.

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
    """What `select` chose.

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
    weight: Literal["softmax", "sigmoid"] = "softmax",
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
    such as one cut by its length, does not vote; where none has an answer, "best" decides and `fallback` says so.

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
    if how not in SELECTS:
        raise ValueError(f"select={how!r} is unknown; it is one of {SELECTS}")
    if weight not in ("softmax", "sigmoid"):
        raise ValueError(f"weight={weight!r} is unknown; it is one of ('softmax', 'sigmoid')")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: a finite number > 0 is needed")
    extract = resolve_answer(answer)
    nodes = list({id(node): node for node in candidates}.values())
    if not nodes:
        raise ValueError("candidates is empty; there is nothing to select from")
    values = [_value(node) for node in nodes]
    best = nodes[values.index(max(values))]
    if how == "best":
        return Selection(best, _answer(extract, best))
    own = [node.weight for node in nodes if node.weight is not None]
    by_strategy = how == "weighted" and len(own) == len(nodes)
    if by_strategy:
        weights = [share / node.count for share, node in zip(own, nodes, strict=True)]
    else:
        weights = [1.0] * len(nodes) if how == "majority" else _weights(values, weight, temperature)
    if how == "weighted" and weight == "softmax" and not by_strategy:
        total = math.fsum(w * node.count for w, node in zip(weights, nodes, strict=True))
        weights = [w / total for w in weights]

    ballots: dict[str, _Ballot] = {}  # by normalised answer; equivalent ones share a ballot
    distinct: list[_Ballot] = []
    abstained = 0
    for node, value, each in zip(nodes, values, weights, strict=True):
        found = (node.path_text().strip() or None) if extract is None else _answer(extract, node)
        if found is None:
            abstained += node.count
            continue
        key = found if extract is None else normalize(found)
        ballot = ballots.get(key)
        if ballot is None:
            if extract is not None:
                ballot = next((other for other in distinct if same_keys(other.key, key)), None)
            if ballot is None:
                ballot = _Ballot(key)
                distinct.append(ballot)
            ballots[key] = ballot
        ballot.cast(node, found, value, each)
    if not distinct:
        reason = f"none of {len(nodes)} candidates has an answer, so {how!r} fell back to 'best'"
        return Selection(best, None, (), abstained, reason)
    table = [(Vote(b.answer, b.votes, math.fsum(b.weights), b.node), b.value) for b in distinct]
    table.sort(key=lambda row: (-row[0].weight, -row[1]))  # stable: the first of equals stays first
    winner = table[0][0]
    return Selection(winner.node, None if extract is None else winner.answer, tuple(v for v, _ in table), abstained)


class _Ballot:
    """Votes for one answer while they are counted."""

    node: Node
    answer: str

    def __init__(self, key: str) -> None:
        self.key = key
        self.votes = 0
        self.weights: list[float] = []
        self.value = -math.inf

    def cast(self, node: Node, answer: str, value: float, weight: float) -> None:
        if not self.votes or value > self.value:
            self.node, self.answer, self.value = node, answer, value
        self.votes += node.count
        self.weights.append(weight * node.count)


def _value(node: Node) -> float:
    if node.value is None or math.isnan(node.value):
        raise ValueError(f"candidate {node!r} has value {node.value}; score it and set its value before selecting")
    return node.value


def _answer(extract: Answer | None, node: Node) -> str | None:
    if extract is None:
        return None
    found = extract(node.path_text())
    if found is not None and not isinstance(found, str):
        raise TypeError(f"answer: the function must return a str or None, it returned {type(found).__name__}")
    return found or None


def _weights(values: Sequence[float], weight: str, temperature: float) -> list[float]:
    """Softmax weights up to a common factor, or sigmoid weights; safe for any size of value, infinities included."""
    if weight == "sigmoid":
        return [_sigmoid(v / temperature) for v in values]
    top = max(values)
    return [1.0 if v == top else math.exp((v - top) / temperature) for v in values]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
