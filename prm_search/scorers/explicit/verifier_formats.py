"""Formats of generative verifiers, each with its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ... import checks
from ...next_token import check_words
from ...prompt import Prompt
from ...sampling import Sampling
from ...steps import StepRule
from ...values import VALUES
from .judge_formats import check_text, filled
from .layouts import Messages
from .policy_scorer import Per

_YES_NO: Mapping[str, float] = MappingProxyType({"yes": 1.0, "no": 0.0})


@dataclass(frozen=True)
class VerifierFormat:
    """A critique's prompt, beginning and end, and the verdict behind it.

    Args:
        name: of the format.
        text: the user's turn; its places are those of JudgeFormat.text.
        closing: what is written behind the critique, right before the verdict.
        opening: how the critique begins; {i} is the number of steps.
        stop: texts that end a critique, and are not part of it; {next} is the number of steps and one.
        later: the user's turn for each step but the first, {step}: a conversation of one turn a step, in which earlier
            critiques stay. None to write all steps into one turn.
        behind: with `later`: what stands behind an earlier verdict.
        system: a system turn; None for none.
        words: verdict words, each one token, with their values.
        per: "step" or "answer".
        aggregate: the value that answers are ranked by; None for q, which for answers is the verdict.
        temperature, top_p, top_k, max_new_tokens: of the critiques.

    Raises:
        TypeError, ValueError: a field is of another kind or out of range, or a place is missing.
    """

    name: str
    text: str
    closing: str
    opening: str = ""
    stop: tuple[str, ...] = ()
    later: str | None = None
    behind: str = ""
    system: str | None = None
    words: Mapping[str, float] = field(default_factory=lambda: _YES_NO)
    per: Per = "step"
    aggregate: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 4096

    def __post_init__(self) -> None:
        checks.non_empty("name", self.name)
        check_text(self.text)
        checks.non_empty("closing", self.closing)
        if self.later is not None and (self.per != "step" or "{step}" not in self.later):
            raise ValueError(f"later={self.later!r}: a text with {{step}} is needed, and per='step'")
        if self.per not in ("step", "answer"):
            raise ValueError(f"per={self.per!r}: it is 'step' or 'answer'")
        if self.aggregate is not None and self.aggregate not in VALUES:
            raise ValueError(f"aggregate={self.aggregate!r} is unknown; it is one of {sorted(VALUES)}")
        check_words(list(self.words))
        if len(self.words) < 2 or not min(self.words.values()) < max(self.words.values()):
            raise ValueError(f"words={dict(self.words)!r}: values that differ are needed")
        object.__setattr__(self, "words", MappingProxyType(dict(self.words)))
        self.sampling(1, 0, self.max_new_tokens)

    def prompt(self, question: Messages, steps: Sequence[str], earlier: Sequence[str] = ()) -> Prompt:
        """Return what the verifier is asked about the last of some steps.

        Args:
            question: chat messages.
            steps: texts of the answer so far.
            earlier: with `later`: the verifier's answers about the steps before, whole.
        """
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        if self.later is None:
            return Prompt(messages=(*messages, {"role": "user", "content": filled(self.text, question, steps)}))
        for place, step in enumerate(steps):
            text = filled(self.later if place else self.text, question, [step])
            messages.append({"role": "user", "content": text})
            if place < len(earlier):
                messages.append({"role": "assistant", "content": earlier[place]})
        return Prompt(messages=tuple(messages))

    def begin(self, steps: int) -> str:
        """Return how a critique of so many steps begins."""
        return self.opening.replace("{i}", str(steps))

    def sampling(self, steps: int, seed: int, tokens: int) -> Sampling:
        """Return how a critique of so many steps is drawn.

        Args:
            steps: their number.
            seed: of the draws.
            tokens: that the critique may have, its beginning included.
        """
        stop = tuple(text.replace("{next}", str(steps + 1)) for text in self.stop)
        return Sampling(
            StepRule(None, max_tokens=None), temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            max_new_tokens=tokens, seed=seed, stop=stop,
        )  # fmt: skip


_THINK = (
    "You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\n{question}\n\n[Solution]"
    "\n\n{steps}\n\nReview and critique each step in the proposed solution to determine whether each step is correct. "
    "If the solution is incomplete, only verify the provided steps."
)
_PARAGRAPHS = "You are a math teacher. Your task is to review and critique the paragraphs in solution step by step."

VERIFIER_FORMATS: Mapping[str, VerifierFormat] = MappingProxyType({
    # ThinkPRM-1.5B, -7B, -14B (arXiv 2504.16828; github.com/mukhal/ThinkPRM): one critique of everything so far.
    "think_prm": VerifierFormat(
        "think_prm", _THINK, "\nIs the solution correct? ", "\nLet's verify step by step:",
        ("Is the solution correct?", "</think>", "Step {next}:"), per="answer",
    ),
    "think_prm_steps": VerifierFormat(
        "think_prm_steps", _THINK, "\nIs the solution correct? ", "\nLet's verify step by step:",
        ("Is the solution correct?", "</think>", "Step {next}:"), aggregate="last",
    ),
    # GenPRM-1.5B, -7B, -32B (arXiv 2504.00891; github.com/RyanLiu112/GenPRM), its mode without code: a turn a step.
    "gen_prm": VerifierFormat(
        "gen_prm", "{question}\n{step}", "</analyze>\n<output>\n**Judgement**: $\\boxed{",
        "<analyze>\nLet's analyze the Paragraph {i} step by step: ", ("</analyze>\n",), later="{step}",
        behind="}$\n</output>\n", system=_PARAGRAPHS, words={"Yes": 1.0, "No": 0.0}, aggregate="min",
        temperature=0.6, top_p=0.95, top_k=20,
        max_new_tokens=2048,
    ),
})  # fmt: skip
