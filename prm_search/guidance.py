"""PRMGuidance: how a response is to be searched for, as users give it to `generate` and to servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from os import PathLike
from typing import Any, Literal

from .answers import Answer, Select
from .checks import HoldsModels, require
from .driver.budget import Budget
from .driver.guidance_file import read_guidance
from .driver.search_settings import SearchSettings
from .protocols import Scorer
from .steps import StepRule
from .strategies import Strategy
from .tree import Prompt
from .values import Value


@dataclass(frozen=True)
class PRMGuidance(HoldsModels):
    """A search, but for its prompts, its policy and how that draws tokens. The fields mean what they mean to `search`.

    Pass it as an argument of each call, never inside a config object: configs are deep-copied, and it cannot be.

    Args:
        pair: an ImplicitPRM, or another Scorer.
        strategy: how to search, or the name of a strategy for its default configuration.
        steps: where a step ends; None for StepRule(), blank lines.
        select: "best", "majority" or "weighted"; None for the strategy's own ("best" for most).
        answer: finds the final answer in a response: "boxed", "####", "number", a function, or None.
        prover: a second scorer.
        budget: limits of each prompt's search; an integer limits its sampled tokens. Its seconds are joined with
            generate's max_time.
        value: what nodes are ranked by; None for the strategy's, or else q.
        seed: of every draw; None leaves it to the caller (`generate` draws one from torch's generator, so
            torch.manual_seed decides).
        weight, weight_temperature: of a weighted vote.
        confidence_tokens: record how sure the policy was of each token (Node.confidences); see `search`.
        prompts: the prompts as text or messages, one a row of generate's inputs. Only a pair with another tokenizer or
            chat template than the policy's needs them, to render the prompts itself.

    Raises:
        TypeError, ValueError: a field is of the wrong kind or out of range; the message names it.
    """

    pair: Scorer
    _: KW_ONLY
    strategy: Strategy | str = "beam"
    steps: StepRule | None = None
    select: Select | None = None
    answer: str | Answer | None = None
    prover: Scorer | None = None
    budget: Budget | int | None = None
    value: Value | str | None = None
    seed: int | None = None
    weight: Literal["softmax", "sigmoid"] = "softmax"
    weight_temperature: float = 1.0
    confidence_tokens: int = 0
    prompts: Sequence[Prompt | str | Sequence[Mapping[str, Any]]] | None = None

    def __post_init__(self) -> None:
        require("pair", self.pair, Scorer)
        if self.prover is not None:
            require("prover", self.prover, Scorer)
            if self.prover.name == self.pair.name:
                raise ValueError(f"prover and pair are both named {self.pair.name!r}; give one of them another name")
        if self.prompts is not None:
            object.__setattr__(self, "prompts", _rendered(self.prompts))
        self.settings(max_new_tokens=1, seed=0)

    @classmethod
    def from_file(cls, path: str | PathLike[str], pair: Scorer, **fields: Any) -> PRMGuidance:
        """The guidance of a file, such as `prm-search tune` writes.

        Args:
            path: of a guidance.yaml; see driver.guidance_file.
            pair: the reward model that it was found for, which the file names but does not hold.
            fields: in place of the file's.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: a field of it, or of `fields`, makes no sense; which is said.
        """
        file = read_guidance(path)
        own: dict[str, Any] = {"strategy": file.strategy, "steps": file.steps, "budget": file.budget, **file.choice}
        return cls(pair, **(own | fields))

    def settings(
        self,
        *,
        max_new_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seconds: float | None = None,
    ) -> SearchSettings:
        """Return what the search loops take: these fields and what the caller decides.

        Args:
            max_new_tokens: tokens of a response.
            seed: used where the field is None.
            temperature, top_p, top_k, min_p: see protocols.Sampling.
            seconds: a further limit on each prompt's search.

        Raises:
            TypeError, ValueError: an argument is out of range.
        """
        budget = Budget.of(self.budget)
        if seconds is not None and seconds < (budget.seconds or float("inf")):
            budget = replace(budget, seconds=seconds)
        return SearchSettings.make(
            strategy=self.strategy,
            steps=self.steps,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed if self.seed is None else self.seed,
            select=self.select,
            answer=self.answer,
            budget=budget,
            value=self.value,
            weight=self.weight,
            weight_temperature=self.weight_temperature,
            confidence_tokens=self.confidence_tokens,
        )


def _rendered(prompts: Any) -> tuple[Prompt, ...]:
    """Prompts that say what their tokens stand for."""
    if isinstance(prompts, str | Prompt | Mapping) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list with text or messages for each row, got {type(prompts).__name__}")
    rendered = []
    for index, item in enumerate(prompts):
        try:
            prompt = Prompt.of(item)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from error
        if prompt.text is None and prompt.messages is None:
            raise ValueError(f"prompts[{index}] must be text or messages: its token ids are what generate has already")
        rendered.append(prompt)
    return tuple(rendered)
