"""The demo task: long chains of invertible arithmetic modulo 10, exactly checkable step by step.

A problem gives a start digit and one operation for each of the variables a, b, c, ...; the response works them from
left to right, one step a variable::

    prompt     =5a*7b+3c*9?
    response   a*7=5;b+3=8;c*9=2          (then the end-of-sequence token)

Every operation is a bijection of the digits (+1 .. +9, *3, *7, *9), so a wrong result is never absorbed: only a second
error can lead back to the right answer. A step is four tokens: ``;`` is the last of every step but the final one, whose
last token is the end of the sequence.

**The task is constructed** (`CONSTRUCTED`). Half of the 120 facts "digit, operation -> digit" are *flawed*: the
demonstrations that the demo's policy learns from write one fixed wrong result for them 60 % of the time, and go on from
it. The policy's errors are therefore systematic, which is what makes majority voting fail and leaves something for a
verifier to find.

No problem belongs to two splits: a keyed hash of the prompt, independent of any seed, says which split a problem is in,
and every generator here draws from one split only.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType

DELIMITER = ";"
CONSTRUCTED = (
    "Constructed task: chains of operations modulo 10; for half of the 120 arithmetic facts, chosen at random, the "
    "policy's training data writes one fixed wrong result 60 % of the time, so its errors are systematic and majority "
    "voting fails."
)

OPERATIONS = (*(f"+{k}" for k in range(1, 10)), "*3", "*7", "*9")
VARIABLES = "abcdefghij"
MAX_LENGTH = len(VARIABLES)
FLAW_RATE = 0.6

# Of every 16 problems: 9 teach the policy, 4 train the PRM, 1 gates the policy, 2 are held out.
SPLITS = MappingProxyType({"policy": range(0, 9), "prm": range(9, 13), "gate": range(13, 14), "test": range(14, 16)})

_STEP = re.compile(r"[a-j][+*][0-9]=[0-9]")
_ANSWER = re.compile(r"=([0-9]);?\s*\Z")


def apply(value: int, operation: str) -> int:
    """The right result of one operation on a digit."""
    operand = int(operation[1])
    return (value + operand if operation[0] == "+" else value * operand) % 10


def _flawed_facts() -> dict[tuple[int, str], int]:
    rng = random.Random("prm_search.demo.chains: flawed facts")
    flawed = {}
    for operation in OPERATIONS:  # half of each operation's ten facts, so no operation is easy
        for value in sorted(rng.sample(range(10), 5)):
            flawed[value, operation] = rng.choice([d for d in range(10) if d != apply(value, operation)])
    return flawed


#: (digit, operation) -> the wrong result that the policy's demonstrations write with probability `FLAW_RATE`.
FLAWED_FACTS = MappingProxyType(_flawed_facts())


@dataclass(frozen=True, slots=True)
class Problem:
    """A chain to work out.

    Attributes:
        prompt: what the model reads, e.g. ``=5a*7b+3?``.
        start: the digit that the chain starts from.
        ops: one operation a variable, in order.
        answer: the right final digit.
        steps: the right steps; joined without anything between them they are the right response.
    """

    prompt: str
    start: int
    ops: tuple[str, ...]
    answer: str
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """A response's faults.

    Attributes:
        correct: every step is right and none is missing or left over. A right `answer` does not imply it: two errors
            can cancel.
        first_wrong_step: index of the first step that is not the right one (a missing or superfluous step counts);
            -1 if none.
        answer: the final answer that the response gives, None if it gives none.
    """

    correct: bool
    first_wrong_step: int
    answer: str | None


def make_problem(start: int, ops: tuple[str, ...]) -> Problem:
    """Builds the problem of a start digit and its operations.

    Raises:
        ValueError: the start is no digit, an operation is unknown, or the chain is empty or longer than `MAX_LENGTH`.
    """
    if not 0 <= start <= 9:
        raise ValueError(f"start must be a digit 0..9, got {start!r}")
    if not 1 <= len(ops) <= MAX_LENGTH:
        raise ValueError(f"ops must hold 1 to {MAX_LENGTH} operations, got {len(ops)}")
    unknown = [op for op in ops if op not in OPERATIONS]
    if unknown:
        raise ValueError(f"ops must be among {', '.join(OPERATIONS)}, got {unknown[0]!r}")
    results, value = [], start
    for op in ops:
        value = apply(value, op)
        results.append(value)
    return Problem(_prompt(start, ops), start, ops, str(value), _steps(ops, results))


def _prompt(start: int, ops: tuple[str, ...]) -> str:
    return f"={start}" + "".join(name + op for name, op in zip(VARIABLES, ops, strict=False)) + "?"


def _steps(ops: tuple[str, ...], results: list[int]) -> tuple[str, ...]:
    """Steps that write the given results, right or wrong; the last one has no delimiter."""
    steps = [f"{name}{op}={r}{DELIMITER}" for name, op, r in zip(VARIABLES, ops, results, strict=False)]
    steps[-1] = steps[-1].removesuffix(DELIMITER)
    return tuple(steps)


def split_of(prompt: str) -> str:
    """The one split that a problem belongs to: "policy", "prm", "gate" or "test"."""
    slot = blake2b(prompt.encode(), digest_size=8, key=b"prm_search.demo.chains").digest()[0] % 16
    return next(name for name, slots in SPLITS.items() if slot in slots)


def stream(split: str, seed: int, length: int) -> Iterator[Problem]:
    """Problems of one split and length without end, uniform and with repeats; the same seed gives the same problems.

    Args:
        split: "policy", "prm", "gate" or "test".
        seed: any integer.
        length: number of steps, 1 to `MAX_LENGTH`.

    Raises:
        ValueError: an unknown split or a length out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length must be 1 to {MAX_LENGTH}, got {length!r}")
    return _stream(split, random.Random(f"{split}/{seed}/{length}"), length)


def _stream(split: str, rng: random.Random, length: int) -> Iterator[Problem]:
    while True:
        start, ops = rng.randrange(10), tuple(rng.choices(OPERATIONS, k=length))
        if split_of(_prompt(start, ops)) == split:
            yield make_problem(start, ops)


def problems(n: int, *, split: str = "test", seed: int = 0, length: int = 8) -> list[Problem]:
    """Draws n distinct problems of one split; the first k of them are the same for every n >= k.

    Args:
        n: how many.
        split: "test" (the default) never holds a problem that the shipped models were trained or gated on, whatever
            the seed.
        seed: any integer.
        length: number of steps, 1 to `MAX_LENGTH`.

    Raises:
        ValueError: n is negative, the split is unknown, the length is out of range, or the split holds fewer than n
            problems of it.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n!r}")
    unique: dict[str, Problem] = {}
    draws = stream(split, seed, length)
    misses = 0
    while len(unique) < n:
        problem = next(draws)
        misses = misses + 1 if problem.prompt in unique else 0
        unique.setdefault(problem.prompt, problem)
        if misses > 20 * (len(unique) + 10):  # every problem of the split has been seen (about 1 - exp(-20) sure)
            raise ValueError(f"n must be at most {len(unique)} for split {split!r} at length {length}, got {n}")
    return list(unique.values())


def demonstrate(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """A worked response as the policy's training data has it: flawed facts go wrong at `FLAW_RATE`, the chain goes on.

    Returns:
        The response and its negative log-likelihood in nats under this very process. A policy's loss on the same
        responses cannot be lower on average, so the ratio of the two says how far it is from having learnt its data.
    """
    results, value, nll = [], problem.start, 0.0
    for op in problem.ops:
        wrong = FLAWED_FACTS.get((value, op))
        if wrong is None:
            value = apply(value, op)
        elif rng.random() < FLAW_RATE:
            value, nll = wrong, nll - math.log(FLAW_RATE)
        else:
            value, nll = apply(value, op), nll - math.log1p(-FLAW_RATE)
        results.append(value)
    return "".join(_steps(problem.ops, results)), nll


def answer(text: str) -> str | None:
    """The final answer of a response: the digit that it ends with, None if it does not end with a result."""
    match = _ANSWER.search(text)
    return match.group(1) if match else None


def check(problem: Problem, response_text: str) -> Check:
    """Compares a response with the right steps. One delimiter too many at the end is accepted, nothing else."""
    written = response_text.strip().removesuffix(DELIMITER).split(DELIMITER)
    right = [step.removesuffix(DELIMITER) for step in problem.steps]
    wrong = next((i for i, (a, b) in enumerate(zip(written, right, strict=False)) if a != b), -1)
    if wrong < 0 and len(written) != len(right):
        wrong = min(len(written), len(right))
    return Check(wrong < 0, wrong, answer(response_text))


def wrong_steps(problem: Problem, response_text: str) -> list[bool]:
    """For each step written: is it wrong in itself, taking the result before it as given?"""
    marks, value = [], problem.start
    for i, step in enumerate(response_text.strip().removesuffix(DELIMITER).split(DELIMITER)):
        if i >= len(problem.ops) or not _STEP.fullmatch(step) or step[:3] != VARIABLES[i] + problem.ops[i]:
            marks.append(True)
            continue
        result = int(step[4])
        marks.append(result != apply(value, problem.ops[i]))
        value = result
    return marks
