"""Templates of `words.py`: stories with slots, a paragraph each of ``stories/<split>.txt``.

A paragraph has the template's name; the question, on one line or more; its steps, ``label: left op right = result``,
the last of which gives the answer; and the lowest and highest of each number that is drawn. A question and a label
have slots: {a}, {b}, ... are numbers, {A}, {B}, {C} names, the others nouns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("policy", "prm", "test")
NAMES = (
    "Ada", "Ben", "Carla", "Dan", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jack", "Kira", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Rosa", "Sam", "Tara", "Uma", "Victor", "Wendy", "Yusuf", "Zoe",
)  # fmt: skip
NOUNS: Mapping[str, tuple[str, ...]] = {  # plurals
    "toy": ("marbles", "stickers", "beads", "balloons", "toy cars", "cards", "blocks", "shells"),
    "food": ("apples", "oranges", "cookies", "muffins", "plums", "peaches", "buns", "pears"),
    "tool": ("pencils", "pens", "notebooks", "crayons", "erasers", "brushes", "rulers", "markers"),
    "animal": ("hens", "goats", "sheep", "ducks", "cows", "rabbits", "geese", "ponies"),
    "plant": ("roses", "tulips", "lilies", "daisies", "bushes", "vines", "herbs", "ferns"),
    "box": ("boxes", "bags", "baskets", "crates", "packs", "trays", "jars", "bins"),
}
_STEP = re.compile(r"(?P<label>[^:]+): (?P<left>\w+) (?P<op>[-+*/]) (?P<right>\w+) = (?P<result>\w)")
_NUMBER = re.compile(r"(\w) (\d+)-(\d+)")


@dataclass(frozen=True)
class Step:
    """One line of a worked answer.

    Attributes:
        label: what is worked out; may have slots.
        left, right: a number's name, or digits.
        op: one of + - * /.
        result: the name of the number that it gives.
    """

    label: str
    left: str
    op: str
    right: str
    result: str


@dataclass(frozen=True)
class Template:
    """A story with slots.

    Attributes:
        name: of its own.
        question: with slots.
        steps: the last one gives the answer.
        numbers: (lowest, highest) of each number that is drawn.
    """

    name: str
    question: str
    steps: tuple[Step, ...]
    numbers: Mapping[str, tuple[int, int]]


def templates(split: str) -> tuple[Template, ...]:
    """The templates of a split, one of `SPLITS`."""
    text = (Path(__file__).with_name("stories") / f"{split}.txt").read_text(encoding="utf-8")
    return tuple(_template(*paragraph.split("\n")) for paragraph in text.strip().split("\n\n"))


def _template(name: str, *lines: str) -> Template:
    *story, numbers = lines
    matches = [(line, _STEP.fullmatch(line)) for line in story]
    return Template(
        name,
        " ".join(line for line, step in matches if step is None),
        tuple(Step(**step.groupdict()) for _, step in matches if step),
        {number: (int(low), int(high)) for number, low, high in _NUMBER.findall(numbers)},
    )
