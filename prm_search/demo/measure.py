"""What the recipe reports of a pair: strategies on held-out problems at equal policy tokens, and step errors.

A strategy is right on a problem when the final answer that it chooses is right. Since two errors can cancel, the table
also says how often the response that it chose has every step right, and what share of the right answers is lucky.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..evaluation.statistics import sign_test, wilson
from .chains import Problem, answer, check, wrong_steps
from .sampling import sample
from .tokenizer import DELIMITER_ID, EOS_ID, prompt_ids, text

Value = Callable[[list[float]], float]
VALUES: dict[str, Value] = {"sum": sum, "min": min, "mean": lambda r: sum(r) / len(r), "last": lambda r: r[-1]}
MAX_STEP_TOKENS = 8
MAX_TOKENS = 48


@dataclass
class Candidate:
    """A response, whole or growing: its tokens, and for each step its reward and its log-prob under the reference."""

    ids: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # beta * nats
    reference: list[float] = field(default_factory=list)  # nats

    @property
    def finished(self) -> bool:
        """Has it ended, or used up its tokens?"""
        return bool(self.ids) and (self.ids[-1] == EOS_ID or len(self.ids) >= MAX_TOKENS)

    @property
    def text(self) -> str:
        """The response as text."""
        return text(self.ids)

    def grown(self, ids: list[int], reward: float, reference: float) -> Candidate:
        """This candidate and one more step."""
        return Candidate(self.ids + ids, [*self.rewards, reward], [*self.reference, reference])


@dataclass(frozen=True)
class Row:
    """One line of the table: how many of the problems a strategy answered rightly, and at what cost."""

    answers: list[bool]
    all_steps: list[bool]
    policy_tokens: float

    def card(self) -> dict[str, float | int]:
        """The line as the card has it; the interval is Wilson's, 95 %."""
        right, n = sum(self.answers), len(self.answers)
        low, high = wilson(right, n)
        return {
            "accuracy": round(right / n, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "all_steps_right": round(sum(self.all_steps) / n, 4),
            "policy_tokens": round(self.policy_tokens, 1),
        }


def step_ends(ids: Sequence[int]) -> list[int]:
    """Where each step of a response ends (exclusive): after a delimiter or at the end of the response."""
    ends = [i + 1 for i, token in enumerate(ids) if token in (DELIMITER_ID, EOS_ID)]
    return ends if ends and ends[-1] == len(ids) else [*ends, len(ids)]


def _step_sums(values: Sequence[float], ends: Sequence[int]) -> list[float]:
    return [sum(values[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def complete_candidates(
    policy: PreTrainedModel, prm: PreTrainedModel, beta: float, asked: Sequence[Problem], n: int, seed: int
) -> list[list[Candidate]]:
    """Draws n whole responses a problem at temperature 1, with step rewards; the policy is also the reference."""
    drawn = sample(
        (policy, prm),
        [prompt_ids(p.prompt) for p in asked],
        copies=n,
        max_new_tokens=MAX_TOKENS,
        generator=torch.Generator().manual_seed(seed),
    )
    candidates = []
    for s in drawn:
        ends = step_ends(s.ids)
        reference, reward = (_step_sums(log_probs, ends) for log_probs in s.log_probs)
        candidates.append(Candidate(s.ids, [beta * (a - b) for a, b in zip(reward, reference, strict=True)], reference))
    return [candidates[i : i + n] for i in range(0, len(candidates), n)]


def beam(
    policy: PreTrainedModel,
    prm: PreTrainedModel,
    beta: float,
    asked: Sequence[Problem],
    *,
    width: int,
    expansions: int,
    rank: Callable[[Candidate], float],
    seed: int,
) -> tuple[list[Candidate], float]:
    """Step-level beam search: `width * expansions` first steps, then `expansions` children of each of the `width` best.

    Equal children are all kept: merging them would make the beam keep wrong prefixes in their place.

    Returns:
        The best candidate of each problem, and the mean number of policy tokens a problem.
    """
    generator = torch.Generator().manual_seed(seed)
    beams: list[list[Candidate]] = [[Candidate()] for _ in asked]
    tokens = 0
    copies = width * expansions
    while any(not c.finished for b in beams for c in b):
        parents = [(i, c) for i, b in enumerate(beams) for c in b if not c.finished]
        drawn = sample(
            (policy, prm),
            [prompt_ids(asked[i].prompt) + c.ids for i, c in parents],
            copies=copies,
            stop=(DELIMITER_ID, EOS_ID),
            max_new_tokens=MAX_STEP_TOKENS,
            generator=generator,
        )
        beams = [[c for c in b if c.finished] for b in beams]
        for k, s in enumerate(drawn):
            i, parent = parents[k // copies]
            reference, reward = (sum(log_probs) for log_probs in s.log_probs)
            beams[i].append(parent.grown(s.ids, beta * (reward - reference), reference))
            tokens += len(s.ids)
        beams = [sorted(b, key=rank, reverse=True)[:width] for b in beams]
        copies = expansions
    return [max(b, key=rank) for b in beams], tokens / len(asked)


def _row(asked: Sequence[Problem], chosen: Sequence[Candidate], tokens: float) -> Row:
    checks = [check(p, c.text) for p, c in zip(asked, chosen, strict=True)]
    right = [k.answer == p.answer for p, k in zip(asked, checks, strict=True)]
    return Row(right, [k.correct for k in checks], tokens)


def _vote(candidates: Sequence[Candidate], weight: Callable[[Candidate], float]) -> Candidate:
    """The first candidate that gives the answer with the largest total weight; ties go to the answer seen first."""
    votes: dict[str, float] = {}
    for c in candidates:
        given = answer(c.text)
        if given is not None:
            votes[given] = votes.get(given, 0.0) + weight(c)
    if not votes:
        return candidates[0]
    winner = max(votes, key=votes.__getitem__)
    return next(c for c in candidates if answer(c.text) == winner)


def evaluate(
    policy: PreTrainedModel, prm: PreTrainedModel, beta: float, asked: Sequence[Problem], *, n: int = 16, seed: int = 0
) -> dict[str, Any]:
    """All strategies on the same problems; majority, best-of-n and the weighted vote choose among the same samples.

    Returns:
        ``strategies`` (name -> accuracy, interval, policy tokens), ``tests`` (paired p-values), ``steps`` (error
        localisation), and the samples' own rates.
    """
    began = time.process_time()
    groups = complete_candidates(policy, prm, beta, asked, n, seed)
    cost = sum(len(c.ids) for g in groups for c in g) / len(asked)
    rows: dict[str, Row] = {}

    greedy = sample((policy,), [prompt_ids(p.prompt) for p in asked], max_new_tokens=MAX_TOKENS)
    rows["greedy"] = _row(asked, [Candidate(s.ids) for s in greedy], sum(len(s.ids) for s in greedy) / len(asked))
    rows[f"majority@{n}"] = _row(asked, [_vote(g, lambda c: 1.0) for g in groups], cost)
    for name, value in VALUES.items():
        rows[f"best-of-{n} {name}"] = _row(asked, [max(g, key=lambda c: value(c.rewards)) for g in groups], cost)
    rows[f"best-of-{n} reference"] = _row(asked, [max(g, key=lambda c: sum(c.reference)) for g in groups], cost)
    for name, weight in _weights(beta).items():
        rows[f"weighted@{n} {name}"] = _row(asked, [_vote(g, weight) for g in groups], cost)

    width = math.isqrt(n)
    noise = torch.Generator().manual_seed(seed)
    ranks: dict[str, Callable[[Candidate], float]] = {
        "min": lambda c: min(c.rewards),
        "sum": lambda c: sum(c.rewards),
        "reference": lambda c: sum(c.reference),
        "random": lambda c: torch.rand((), generator=noise).item(),
    }
    for name, rank in ranks.items():
        chosen, tokens = beam(policy, prm, beta, asked, width=width, expansions=n // width, rank=rank, seed=seed + 1)
        rows[f"beam {width}x{n // width} {name}"] = _row(asked, chosen, tokens)

    flat = [(p, c) for p, g in zip(asked, groups, strict=True) for c in g]
    right = [answer(c.text) == p.answer for p, c in flat]
    solved = [check(p, c.text).correct for p, c in flat]
    best, weighted = rows[f"best-of-{n} sum"], rows[f"weighted@{n} softmax"]
    return {
        "problems": len(asked),
        "pass@1": round(sum(right) / len(flat), 4),
        "pass@1 all steps": round(sum(solved) / len(flat), 4),
        f"pass@{n}": round(sum(any(right[i : i + n]) for i in range(0, len(flat), n)) / len(asked), 4),
        f"pass@{n} all steps": round(sum(any(solved[i : i + n]) for i in range(0, len(flat), n)) / len(asked), 4),
        "lucky_share": round(1 - sum(solved) / max(1, sum(right)), 4),
        "strategies": {name: row.card() for name, row in rows.items()},
        "tests": {
            "best-of-n sum against majority": sign_test(best.answers, rows[f"majority@{n}"].answers),
            "weighted softmax against majority": sign_test(weighted.answers, rows[f"majority@{n}"].answers),
            **{
                f"beam {name} against best-of-n sum": sign_test(
                    rows[f"beam {width}x{n // width} {name}"].answers, best.answers
                )
                for name in ("min", "sum")
            },
        },
        "steps": _localisation(asked, groups),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def _weights(beta: float) -> dict[str, Callable[[Candidate], float]]:
    """Vote weights: the label's probability, sigmoid(q); and exp(q / beta), the likelihood ratio itself."""
    return {
        "sigmoid": lambda c: 1 / (1 + math.exp(-max(-500.0, min(500.0, sum(c.rewards))))),
        "softmax": lambda c: math.exp(max(-700.0, min(700.0, sum(c.rewards) / beta))),
    }


def _localisation(asked: Sequence[Problem], groups: Sequence[Sequence[Candidate]]) -> dict[str, float | int]:
    """Does the smallest step reward point at an error? Over one response a problem, the first that has a wrong step.

    A step is an error here if it is wrong given the result before it: a mere consequence of an earlier error is none.
    """
    found = first = single = single_found = total = 0
    chance = 0.0
    for problem, group in zip(asked, groups, strict=True):
        for c in group:
            marks = wrong_steps(problem, c.text)
            if not any(marks) or len(marks) != len(c.rewards):
                continue
            lowest = min(range(len(marks)), key=c.rewards.__getitem__)
            total += 1
            found += marks[lowest]
            first += lowest == marks.index(True)
            chance += sum(marks) / len(marks)
            if sum(marks) == 1:
                single, single_found = single + 1, single_found + marks[lowest]
            break
    return {
        "responses": total,
        "lowest_is_an_error": round(found / max(1, total), 4),
        "chance_of_an_error": round(chance / max(1, total), 4),
        "lowest_is_the_first_error": round(first / max(1, total), 4),
        "single_error_responses": single,
        "single_error_found": round(single_found / max(1, single), 4),
    }
