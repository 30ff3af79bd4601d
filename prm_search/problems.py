"""Problems with known answers, and outcome labels: is a response's final answer the reference answer? No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from .answers import Answer, boxed, hashes, last_number, resolve_answer
from .answers.equivalence import alike, equivalent, form
from .answers.verifiers import answer_to, is_source, score
from .tree import Prompt

Same = Callable[[str, str], bool]
LABELS = ("math", "exact")


@dataclass(frozen=True)
class Problem:
    """A question, and its right final answer."""

    prompt: Prompt
    answer: str


def final_answer(text: str) -> str | None:
    """Return what follows the last "####", else what is in the last box, else the last number; None without any."""
    return hashes(text) or boxed(text) or last_number(text)


def stated_answer(solution: str) -> str:
    """The answer of a reference solution: what follows its "####" (GSM8K), else its box (MATH), else all of it."""
    return hashes(solution) or boxed(solution) or solution.strip()


@dataclass(frozen=True)
class Judge:
    """Labels responses.

    A problem of reasoning-gym is judged by its own verifier, whatever `same` names: see answers.verifiers.

    Args:
        same: "math": the answers are equivalent, by spelling, number, or math-verify. "exact": the same without
            math-verify (equal numbers, or one spelling). Or a function of a response's whole text and the reference
            answer.
        answer: where the answer stands in a response: "boxed", "####", "number", a function of its text, or None for
            the first of "####", box and number that it has. Not asked where `same` is a function.

    Raises:
        ValueError: no label or extractor has this name.
        TypeError: same or answer is neither a name nor a function.
        ImportError: "math" without the package math-verify.
    """

    same: str | Same = "math"
    answer: str | Answer | None = None

    def __post_init__(self) -> None:
        resolve_answer(self.answer)
        if isinstance(self.same, str):
            if self.same not in LABELS:
                raise ValueError(f"same={self.same!r} is unknown; it is one of {LABELS}, or a function")
            if self.same == "math" and find_spec("math_verify") is None:
                raise ImportError(
                    "labels by 'math' need math-verify: pip install 'prm-search[answers]', or use 'exact'"
                )
        elif not callable(self.same):
            raise TypeError(f"same must be one of {LABELS} or a function, got {type(self.same).__name__}")

    def __call__(self, text: str, reference: str) -> tuple[str | None, bool]:
        """The answer found in a complete response (None where none is, or none is looked for), and its label."""
        if not isinstance(self.same, str):
            return None, bool(self.same(text, reference))
        verified = is_source(reference)
        extract = resolve_answer(self.answer) or (answer_to if verified else final_answer)
        extracted = extract(text)
        if extracted is None:
            return None, False
        if verified:
            return extracted, score(reference, extracted) >= 1.0
        if self.same == "exact":
            return extracted, alike(form(extracted), form(reference))
        return extracted, equivalent(extracted, reference)
