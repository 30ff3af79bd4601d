"""Settings: everything about one prompt's search but its models, checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..answers import SELECTS, Answer, Select, Selection, resolve_answer, select
from ..checks import is_one_of, number
from ..protocols import Sampling
from ..steps import StepRule
from ..stop_strings import stop_strings
from ..strategies import Strategy, resolve_strategy
from ..strategies.base import strategy_confidence
from ..tree import Node
from ..values import Value, resolve_value
from .budget import Budget


@dataclass(frozen=True)
class SearchSettings:
    """Settings of one prompt's search. `SearchSettings.make` takes the arguments of `search`.

    Attributes:
        strategy, sampling, budget: see there.
        value: what to rank by; None leaves it to the strategy and the scorer.
        select, answer, weight, weight_temperature: see answers.select.
    """

    strategy: Strategy
    sampling: Sampling
    budget: Budget
    value: Value | str | None = None
    select: Select = "best"
    answer: Answer | None = None
    weight: Literal["softmax", "sigmoid"] = "softmax"
    weight_temperature: float = 1.0

    @classmethod
    def make(
        cls,
        *,
        strategy: Strategy | str = "beam",
        steps: StepRule | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.8,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        include_stop_str: bool = False,
        confidence_tokens: int = 0,
        select: Select | None = None,
        answer: str | Answer | None = None,
        budget: Budget | int | None = None,
        value: Value | str | None = None,
        weight: Literal["softmax", "sigmoid"] = "softmax",
        weight_temperature: float = 1.0,
    ) -> SearchSettings:
        """Settings from the arguments of `search`. Raises ValueError or TypeError as it does."""
        chosen_strategy = resolve_strategy(strategy)
        chosen: Select = getattr(chosen_strategy, "select", "best") if select is None else select
        if not is_one_of(chosen, SELECTS):
            raise ValueError(f"select={select!r} is unknown; it is one of {SELECTS}")
        if not is_one_of(weight, ("softmax", "sigmoid")):
            raise ValueError(f"weight={weight!r}: it is 'softmax' or 'sigmoid'")
        number("weight_temperature", weight_temperature, "a finite number > 0", lambda x: 0 < x < float("inf"))
        if value is not None:
            resolve_value(value)
        sampling = Sampling(
            steps=StepRule() if steps is None else steps,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop_strings(stop),
            include_stop_str=include_stop_str,
            confidence_tokens=strategy_confidence(chosen_strategy) or confidence_tokens,
        )
        if confidence_tokens not in (0, sampling.confidence_tokens):
            own = sampling.confidence_tokens
            raise ValueError(f"confidence_tokens={confidence_tokens}: {chosen_strategy!r} reads them over {own} tokens")
        return cls(
            chosen_strategy, sampling, Budget.of(budget), value, chosen, resolve_answer(answer),
            weight, weight_temperature,
        )  # fmt: skip

    def within(self, room: int | None) -> SearchSettings:
        """The same with at most `room` response tokens (None: no further limit)."""
        if room is None or room >= self.sampling.max_new_tokens:
            return self
        return replace(self, sampling=replace(self.sampling, max_new_tokens=room))

    def choose(self, candidates: Sequence[Node]) -> Selection | None:
        """The winner, complete responses before cut ones; None where there are no candidates."""
        if not candidates:
            return None
        return select(
            _complete(candidates),
            self.select,
            answer=self.answer,
            weight=self.weight,
            temperature=self.weight_temperature,
        )

    def rank(self, candidates: Sequence[Node], winner: Node | None) -> list[Node]:
        """The winner, then the other candidates: complete ones first, by value, the first of equals first."""
        return sorted(
            candidates,
            key=lambda node: (node is not winner, node.finish != "stop", -(node.value or 0.0)),
        )

    def eligible(self, finished: Sequence[Node]) -> list[Node]:
        """The finished nodes of a running search that `choose` may still come to."""
        rivals = _complete(finished)
        if self.select != "best" or not rivals:
            return rivals
        top = max(node.value or 0.0 for node in rivals)
        return [node for node in rivals if (node.value or 0.0) == top]


def _complete(candidates: Sequence[Node]) -> list[Node]:
    """Return those that end by themselves; all of them where every one was cut by a length or a budget."""
    return [node for node in candidates if node.finish == "stop"] or list(candidates)
