"""Formats of judges: what a language model is asked, and what its words are worth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ... import checks
from ...next_token import check_words
from ...prompt import Prompt
from ...values import VALUES
from .layouts import Messages, plain_question
from .policy_scorer import Per, chat_prompt

_PLACE = re.compile(r"\{(question|answer|steps|step)\}")


def grades(words: Sequence[str]) -> dict[str, float]:
    """Return grades from best to worst with their values, evenly from 1 to 0; at least two."""
    if len(check_words(words)) < 2:
        raise ValueError(f"words={checks.shown(words)}: two grades are needed at least")
    return {word: 1 - place / (len(words) - 1) for place, word in enumerate(words)}


@dataclass(frozen=True)
class JudgeFormat:
    """A judge's prompt and verdict.

    Args:
        text: what is asked, with {question}, and {answer} (the whole text so far), {steps} ("Step 1: ...", a line
            each) or {step} (the last one alone). What stands before the solution is encoded once for all steps of a
            search, so the instruction for the last step belongs behind it.
        words: verdict words, each one token, with their values (see `grades`).
        per: "step" to judge each step, "answer" to judge finished answers.
        system: a system turn before it; None for none.
        answer: how the judge's answer begins, right before the verdict.
        chat: ask by the chat template; False for plain text, for models without one.
        aggregate: the value that answers are ranked by: a name of `values.VALUES`; None for q, which for answers is
            the verdict.

    Raises:
        TypeError, ValueError: a field is of another kind, a place is missing, or words or their values do not serve.
    """

    text: str
    words: Mapping[str, float]
    per: Per = "step"
    system: str | None = None
    answer: str = ""
    chat: bool = True
    aggregate: str | None = None

    def __post_init__(self) -> None:
        check_text(self.text)
        if not isinstance(self.words, Mapping):
            raise TypeError(f"words={checks.shown(self.words)}: a dict from words to values is needed")
        check_words(list(self.words))
        for word, value in self.words.items():
            checks.number(f"words[{word!r}]", value, "a finite number", lambda x: abs(x) < float("inf"))
        if not self.low < self.high:
            raise ValueError(f"words={dict(self.words)!r}: values that differ are needed")
        if self.per not in ("step", "answer"):
            raise ValueError(f"per={self.per!r}: it is 'step' or 'answer'")
        if self.system is not None:
            checks.non_empty("system", self.system)
        if not isinstance(self.answer, str):
            raise TypeError(f"answer={checks.shown(self.answer)}: a string is needed")
        checks.flag("chat", self.chat)
        if self.aggregate is not None and self.aggregate not in VALUES:
            raise ValueError(f"aggregate={self.aggregate!r} is unknown; it is one of {sorted(VALUES)}")
        object.__setattr__(self, "words", MappingProxyType(dict(self.words)))

    @property
    def low(self) -> float:
        """The least that a verdict is worth."""
        return float(min(self.words.values()))

    @property
    def high(self) -> float:
        """The most that a verdict is worth."""
        return float(max(self.words.values()))

    def prompt(self, question: Messages, steps: Sequence[str]) -> Prompt:
        """Return what the judge is asked.

        Args:
            question: chat messages.
            steps: texts of the answer so far; of a whole answer one.
        """
        text = filled(self.text, question, steps)
        if self.chat:
            return chat_prompt(self.system, text)
        return Prompt(text=text if self.system is None else f"{self.system}\n\n{text}")


def filled(text: str, question: Messages, steps: Sequence[str]) -> str:
    """Return a prompt with its places filled, each once, whatever braces the parts hold.

    Args:
        text: with {question}, {answer}, {steps} or {step}; see JudgeFormat.
        question: chat messages.
        steps: texts of the answer so far, at least one.
    """
    parts = {
        "question": plain_question(question),
        "answer": "\n\n".join(steps),
        "steps": "\n".join(_labelled(number, step) for number, step in enumerate(steps, start=1)),
        "step": steps[-1],
    }
    return _PLACE.sub(lambda match: parts[match[1]], text)


def _labelled(number: int, step: str) -> str:
    label = f"Step {number}:"
    return step if step.startswith(label) else f"{label} {step}"


def check_text(text: str) -> None:
    """Check a prompt's text. Raises TypeError or ValueError where a place is missing."""
    checks.non_empty("text", text)
    places = set(_PLACE.findall(text))
    if "question" not in places or len(places) < 2:
        raise ValueError("text: {question} is needed, and one of {answer}, {steps} and {step}")


_TEACHER = "You check solutions of problems. You answer with one word."
_SOLUTION = "Problem:\n{question}\n\nSolution:\n{answer}\n\n"
_SO_FAR = "Problem:\n{question}\n\nSolution so far:\n{steps}\n\n"
_YES_NO = {"yes": 1.0, "no": 0.0}
_STEP_GRADES = "A: surely right. B: probably right. C: cannot be told. D: probably wrong. E: surely wrong. Your grade:"

JUDGE_FORMATS: Mapping[str, JudgeFormat] = MappingProxyType({
    "step_yes_no": JudgeFormat(
        _SO_FAR + "Is the last step right? Answer yes or no.", _YES_NO, "step", _TEACHER, aggregate="min"
    ),
    "step_grade": JudgeFormat(
        _SO_FAR + "Grade the last step. " + _STEP_GRADES, grades(tuple("ABCDE")), "step", _TEACHER, aggregate="min"
    ),
    "answer_yes_no": JudgeFormat(
        _SOLUTION + "Is the final answer right? Answer yes or no.", _YES_NO, "answer", _TEACHER
    ),
    "answer_grade": JudgeFormat(
        _SOLUTION + "Grade the solution. " + _STEP_GRADES, grades(tuple("ABCDE")), "answer", _TEACHER
    ),
})  # fmt: skip
