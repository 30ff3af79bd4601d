"""Grade-school word problems with worked answers: ``python words.py --split policy --n 4000 --out F``.

A template (`word_templates`) is a story with slots and its steps. Names, nouns and numbers are drawn until every result
is a whole number from 1 to `LARGEST`; the worked answer has one step a line, then the final answer in GSM8K's form::

    Mia has 4 bags of 6 marbles. Mia gives 9 marbles to Ben. How many marbles are left?

    marbles in all: 4*6=24
    marbles left: 24-9=15
    #### 15

No template belongs to two splits: a policy is fine-tuned on "policy", it answers "prm" to train a PRM, and both are
measured on "test". So in both it meets stories that it was not taught.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from word_templates import NAMES, NOUNS, SPLITS, Step, Template, templates

LARGEST = 999
STEPS = range(2, 6)  # how many the templates have
_TRIES = 10_000


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and how it is worked out.

    Attributes:
        question: one line.
        steps: ``label: 4*6=24``, one a step.
        answer: the final answer, digits.
        template: its template's name.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    template: str

    @property
    def worked(self) -> str:
        """The whole answer: a step a line, then ``#### answer``."""
        return "\n".join((*self.steps, f"#### {self.answer}"))

    def record(self, name: str) -> dict[str, Any]:
        """As a line of a JSON Lines file has it; `prm-search rollout` and `sft.py` read that."""
        return {"id": name, "question": self.question, "answer": self.worked, "template": self.template}


def problems(n: int, *, split: str = "test", seed: int = 0, min_steps: int = 2, max_steps: int = 5) -> list[Problem]:
    """Draws n distinct problems of one split, its templates in turn; the first k of them are the same for every n >= k.

    Args:
        n: how many.
        split: "policy", "prm" or "test".
        seed: any integer.
        min_steps, max_steps: 2 to 5.

    Raises:
        ValueError: n is negative, the split is unknown, the steps are out of range, or there are fewer than n problems.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not STEPS[0] <= min_steps <= max_steps <= STEPS[-1]:
        raise ValueError(
            f"min_steps <= max_steps must be {STEPS[0]} to {STEPS[-1]}, got {min_steps!r} and {max_steps!r}"
        )
    told = [template for template in templates(split) if min_steps <= len(template.steps) <= max_steps]
    found: dict[str, Problem] = {}
    misses = 0
    for problem in _stream(told, random.Random(f"{split}/{seed}/{min_steps}/{max_steps}")):
        if len(found) == n:
            break
        misses = misses + 1 if problem.question in found else 0
        if misses > _TRIES:  # all have been seen
            raise ValueError(f"n must be at most {len(found)} for these steps of split {split!r}, got {n}")
        found.setdefault(problem.question, problem)
    return list(found.values())


def _stream(told: Sequence[Template], rng: random.Random) -> Iterator[Problem]:
    while True:
        for template in rng.sample(told, len(told)):
            yield draw(template, rng)


def draw(template: Template, rng: random.Random) -> Problem:
    """One problem of a template.

    Raises:
        ValueError: no numbers in the template's ranges make every result a whole number from 1 to `LARGEST`.
    """
    words = dict(zip("ABC", rng.sample(NAMES, 3), strict=True)) | {
        slot: rng.choice(nouns) for slot, nouns in NOUNS.items()
    }
    for _ in range(_TRIES):
        numbers = {name: rng.randint(*ends) for name, ends in template.numbers.items()}
        worked = _work(template.steps, numbers)
        if worked is not None:
            slots = words | {name: str(number) for name, number in numbers.items()}
            steps = tuple(
                f"{step.label.format_map(slots)}: {line}" for step, line in zip(template.steps, worked, strict=True)
            )
            return Problem(template.question.format_map(slots), steps, worked[-1].rpartition("=")[2], template.name)
    raise ValueError(f"template {template.name}: its numbers give no whole results from 1 to {LARGEST}")


def _work(steps: Sequence[Step], given: dict[str, int]) -> list[str] | None:
    """Each step's arithmetic, or None where a result is not allowed."""
    numbers, lines = dict(given), []
    for step in steps:
        left, right = (int(side) if side.isdigit() else numbers[side] for side in (step.left, step.right))
        if step.op == "/" and left % right:
            return None
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[step.op]
        if not 1 <= result <= LARGEST:
            return None
        numbers[step.result] = result
        lines.append(f"{left}{step.op}{right}={result}")
    return lines


def parser() -> argparse.ArgumentParser:
    """Return what the command takes."""
    made = argparse.ArgumentParser(description="Grade-school word problems with worked answers.")
    made.add_argument("--split", choices=SPLITS, required=True, help="whose templates; no template is in two")
    made.add_argument("--n", type=int, required=True, help="problems")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--min-steps", type=int, default=STEPS[0], metavar="N")
    made.add_argument("--max-steps", type=int, default=STEPS[-1], metavar="N")
    made.add_argument("--out", required=True, help="JSON Lines; - is standard output")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: writes problems as JSON Lines. Returns the exit status."""
    given = parser().parse_args(arguments)
    try:
        drawn = problems(
            given.n, split=given.split, seed=given.seed, min_steps=given.min_steps, max_steps=given.max_steps
        )
    except ValueError as error:
        parser().error(str(error))
    names = (f"{given.split}-{given.seed}-{place}" for place in range(len(drawn)))
    text = "".join(json.dumps(problem.record(name)) + "\n" for problem, name in zip(drawn, names, strict=True))
    if given.out == "-":
        sys.stdout.write(text)
        return 0
    try:
        with Path(given.out).open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        parser().error(f"--out {given.out} cannot be written: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
