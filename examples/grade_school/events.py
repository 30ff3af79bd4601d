"""Short word problems of events with worked answers: ``python events.py --split prm --steps 3 --n 600 --out F``.

A person has some things, then a few events change how many; the worked answer has one calculation a line::

    Mia has 7 shells. Ben gives her 5. She doubles her shells. How many shells does Mia have now?

    7+5=12
    12*2=24

Numbers are small: a start of 2 to 12, addends of 2 to 9, times 2 or 3, every result 1 to 24. So the facts recur in all
splits, dozens of times in a few hundred problems, while no question is in two splits: a hash of it says in which.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

SPLITS = {"policy": 0.3, "prm": 0.4, "gate": 0.1, "test": 0.2}  # share of all questions
STEPS = range(1, 6)
LARGEST = 24
_PEOPLE = {
    "Ada": "She", "Carla": "She", "Elif": "She", "Grace": "She", "Ines": "She", "Kira": "She", "Mia": "She",
    "Ben": "He", "Dan": "He", "Hugo": "He", "Jack": "He", "Leo": "He", "Noah": "He", "Paul": "He", "Sam": "He",
}  # fmt: skip
_NOUNS = ("shells", "stickers", "marbles", "cards", "coins", "stamps", "beads", "pens", "apples", "plums", "cookies")
_EVENTS = {
    "+": ("{She} finds {n} more.", "{She} buys {n} more.", "{other} gives {her} {n}.", "{She} gets {n} from {other}."),
    "-": ("{She} loses {n}.", "{She} sells {n}.", "{She} gives {n} to {other}.", "{other} takes {n}."),
    "*": ("{She} {times} {own} {noun}.", "Then {she} has {n} times as many."),
}
_TIMES = {2: "doubles", 3: "triples"}
_TRIES = 100_000


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and how it is worked out.

    Attributes:
        question: one line.
        steps: calculations such as ``7+5=12``, in order.
    """

    question: str
    steps: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The last result."""
        return self.steps[-1].rpartition("=")[2]

    def record(self, name: str, *, worked: bool) -> dict[str, str]:
        """A line of a JSON Lines file; its answer is the worked one, or the final one alone."""
        return {"id": name, "question": self.question, "answer": "\n".join(self.steps) if worked else self.answer}


def split_of(question: str) -> str:
    """Return the one split that a question belongs to."""
    place = int.from_bytes(blake2b(question.encode(), digest_size=4).digest(), "big") / 2**32
    for name, share in SPLITS.items():
        place -= share
        if place < 0:
            return name
    return name


def problems(n: int, *, split: str, steps: int, seed: int = 0) -> list[Problem]:
    """Draw n distinct problems of one split; the first k of them are the same for every n >= k.

    Args:
        n: how many.
        split: a key of SPLITS.
        steps: events of each problem, 1 to 5.
        seed: any integer.

    Raises:
        ValueError: an argument is out of range, or the split has too few problems.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if steps not in STEPS:
        raise ValueError(f"steps must be {STEPS[0]} to {STEPS[-1]}, got {steps!r}")
    rng = random.Random(f"{seed}/{steps}")
    distinct: dict[str, Problem] = {}
    for _ in range(_TRIES + 100 * n):
        if len(distinct) == n:
            return list(distinct.values())
        problem = draw(steps, rng)
        if split_of(problem.question) == split:
            distinct.setdefault(problem.question, problem)
    raise ValueError(f"n must be at most about {len(distinct)} for {steps} steps of split {split!r}, got {n}")


def draw(steps: int, rng: random.Random) -> Problem:
    """Draw one problem with so many events."""
    name, other = rng.sample(sorted(_PEOPLE), 2)
    noun, pronoun = rng.choice(_NOUNS), _PEOPLE[name]
    object_, own = ("her", "her") if pronoun == "She" else ("him", "his")
    number = rng.randint(2, 12)
    sentences, lines = [f"{name} has {number} {noun}."], []
    while len(lines) < steps:
        operation = rng.choice("+-*")
        operand = rng.choice(tuple(_TIMES)) if operation == "*" else rng.randint(2, 9)
        result = {"+": number + operand, "-": number - operand, "*": number * operand}[operation]
        if not 1 <= result <= LARGEST:
            continue
        slots = {"She": pronoun, "she": pronoun.lower(), "her": object_, "own": own, "other": other, "noun": noun}
        event = rng.choice(_EVENTS[operation])
        sentences.append(event.format(**slots, n=operand, times=_TIMES.get(operand, "")))
        lines.append(f"{number}{operation}{operand}={result}")
        number = result
    return Problem(" ".join((*sentences, f"How many {noun} does {name} have now?")), tuple(lines))


def write(path: Path, drawn: Sequence[Problem], name: str, *, worked: bool) -> None:
    """Write problems as JSON Lines, whole or not at all."""
    records = (problem.record(f"{name}-{place}", worked=worked) for place, problem in enumerate(drawn))
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    part.replace(path)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command = argparse.ArgumentParser(description="Word problems of events, with worked answers.")
    command.add_argument("--split", choices=SPLITS, required=True, help="no question is in two splits")
    command.add_argument("--n", type=int, required=True, help="problems")
    command.add_argument("--steps", type=int, required=True, help="events of each problem, 1 to 5")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--worked", action="store_true", help="worked answers, to learn from; otherwise final ones")
    command.add_argument("--out", type=Path, required=True, help="JSON Lines")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Write problems as JSON Lines. Returns the exit status."""
    command = parser()
    chosen = command.parse_args(arguments)
    try:
        drawn = problems(chosen.n, split=chosen.split, steps=chosen.steps, seed=chosen.seed)
        write(chosen.out, drawn, f"{chosen.split}-{chosen.seed}-{chosen.steps}", worked=chosen.worked)
    except (ValueError, OSError) as error:
        command.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
