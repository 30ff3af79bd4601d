"""Samples: whole responses to one problem, judged and scored once, chosen among at every budget. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..answers import Answer, Candidate, Select, elect
from ..usage import Usage
from .plan import Cell, Plan

#: Of a response's text and the reference answer: the answer found and whether it is right (problems.Judge).
Judge = Callable[[str, str], tuple[str | None, bool]]
HOW: dict[str, Select] = {"best_of_n": "best", "majority": "majority", "weighted": "weighted"}


@dataclass(frozen=True)
class Sample:
    """A whole response.

    Attributes:
        text: without special tokens.
        answer: what it votes for; None for no answer, and for a response that was cut.
        right: its label.
        tokens: how many it has, its end of sequence included.
        new_tokens: how many of them no earlier sample shares as steps below the same prefix, which is what a
            scorer has to encode.
        finish: "stop", or "length" where it was cut.
        values: pair -> value -> number.
    """

    text: str
    answer: str | None
    right: bool
    tokens: int
    new_tokens: int
    finish: str
    values: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """The cost of scoring all samples of a problem.

    Attributes:
        prm_tokens, reference_tokens: encoded by either model, the prompt included; 0 where the sampler's own
            log-probabilities served.
        seconds: wall time.
    """

    prm_tokens: int
    reference_tokens: int
    seconds: float

    @classmethod
    def of(cls, usage: Usage, roles: Iterable[str], seconds: float) -> Cost:
        """Read a cost from a usage.

        Args:
            usage: of the scoring.
            roles: of the scorer's models; all but "reference" are reward models.
            seconds: wall time.
        """
        return cls(scorer_tokens(usage, roles), usage.of_role("reference"), seconds)


def scorer_tokens(usage: Usage, roles: Iterable[str]) -> int:
    """Tokens that a scorer's models encoded, references left out.

    Args:
        usage: of a search or a scoring.
        roles: of the scorer's models.
    """
    return sum(usage.of_role(role) for role in roles if role != "reference")


@dataclass(frozen=True)
class Judging:
    """The rules of labels and votes.

    Attributes:
        judge: labels a complete response.
        answer: finds what it votes for.
        reference: the problem's right answer.
    """

    judge: Judge
    answer: Answer
    reference: str

    def __call__(self, text: str, finish: str | None) -> tuple[str | None, bool]:
        """Vote and label of a response. One that was cut has given no answer: wrong."""
        if finish != "stop":
            return None, False
        return self.answer(text) or None, bool(self.judge(text, self.reference)[1])


def choose(
    samples: Sequence[Sample],
    cell: Cell,
    *,
    weight_temperature: float = 1.0,
) -> Sample:
    """The sample that a cell chooses among its first n.

    Votes are counted by answers.elect, complete responses before cut ones. A majority vote sees no rewards, so it
    breaks ties by draw order.

    Raises:
        ValueError: there are fewer than n samples, or they lack the cell's value.
    """
    if len(samples) < cell.n:
        raise ValueError(f"{cell.title()} at {cell.n} needs as many samples, got {len(samples)}")
    among = samples[: cell.n]
    rivals = [sample for sample in among if sample.finish == "stop"] or among
    candidates = [Candidate(sample.answer, _value(sample, cell)) for sample in rivals]
    how: Select = HOW[cell.strategy]
    weight: Any = cell.weight or "softmax"
    return rivals[elect(candidates, how, weight=weight, temperature=weight_temperature).place]


def _value(sample: Sample, cell: Cell) -> float:
    """Return what a cell ranks or weighs a sample by; 0 for a majority vote, which then breaks ties by draw order."""
    if cell.pair is None or cell.value is None:
        return 0.0
    if cell.value not in sample.values.get(cell.pair, {}):
        raise ValueError(f"{cell.title()}: the samples were not scored by {cell.pair!r} in that value")
    return sample.values[cell.pair][cell.value]


def record_of(
    samples: Sequence[Sample],
    costs: dict[str, Cost],
    plan: Plan,
    *,
    seconds: float = 0.0,
    prompt_tokens: int = 0,
) -> dict[str, Any]:
    """A problem's samples and what each cell chooses of them, as plain values.

    Args:
        samples: at least as many as the largest budget.
        costs: of scoring all of them, by pair.
        plan: says which cells.
        seconds: wall time that drawing all of them took.
        prompt_tokens: of the problem's prompt.
    """
    chosen = []
    for cell in plan.votes(list(costs)):
        winner = choose(samples, cell, weight_temperature=plan.weight_temperature)
        chosen.append({**asdict(cell), "answer": winner.answer, "right": winner.right, "finish": winner.finish})
    return {
        "prompt_tokens": prompt_tokens,
        "seconds": seconds,
        "samples": [asdict(sample) for sample in samples],
        "scoring": {name: asdict(cost) for name, cost in costs.items()},
        "chosen": chosen,
    }


def tokens_of(record: dict[str, Any], n: int) -> int:
    """Policy tokens of the first n samples of such a record."""
    return sum(sample["tokens"] for sample in record["samples"][:n])


def new_tokens(paths: Iterable[Sequence[tuple[object, int]]]) -> list[int]:
    """For each path of (step, its tokens): tokens of the steps that came up in no path before."""
    seen: set[object] = set()
    counts = []
    for path in paths:
        counts.append(sum(tokens for step, tokens in path if step not in seen))
        seen.update(step for step, _ in path)
    return counts
