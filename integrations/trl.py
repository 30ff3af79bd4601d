"""Rewards of this library in TRL's GRPOTrainer: a scorer as a reward function, and PRIME's online update of a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from prm_search.scorers.base import ScorerBase
from prm_search.scorers.explicit.step_scores import StepScores
from prm_search.scorers.implicit.implicit_prm import ImplicitPRM
from prm_search.scorers.pair import Pair
from prm_search.steps import StepRule
from prm_search.tokens import TokenizerMatch
from prm_search.training.online import OnlineUpdater, Outcome, Update
from prm_search.tree import Prompt
from prm_search.values import VALUES, along

Completion = str | Sequence[dict[str, Any]]


class PRMReward:
    """A scorer as a reward function: ``GRPOTrainer(reward_funcs=[PRMReward(pair, tokenizer=tokenizer)], ...)``.

    A completion's reward is its value at its end: of a pair by default q, the outcome; "min", "mean" or "last" make
    one of its steps' rewards. A completion without tokens has none (None, which TRL leaves out). The table of
    completions that TRL logs gets a column with the step rewards, its metrics their mean.

    With the trainer's tokenizer, a pair that has the same one scores the sampled tokens as they are. Any other scorer
    reads the texts, in its own tokens; a completion that was cut has no end of sequence, and gets none.

    Args:
        scorer: an ImplicitPRM, a StepPRM, or another scorer of complete responses.
        tokenizer: the trainer's processing_class; None: completions count as complete, and are read as texts.
        value: a name of values.VALUES; None for the scorer's own, or else q.
        steps: where steps end; None for StepRule().

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the message names it.
    """

    def __init__(
        self, scorer: ScorerBase, *, tokenizer: Any = None, value: str | None = None, steps: StepRule | None = None
    ) -> None:
        if not isinstance(scorer, ScorerBase):
            raise TypeError(f"scorer must score complete responses, got {type(scorer).__name__}")
        if value is not None and value not in VALUES:
            raise ValueError(f"value={value!r} is unknown; it is one of {sorted(VALUES)}")
        if steps is not None and not isinstance(steps, StepRule):
            raise TypeError(f"steps must be a StepRule or None, got {type(steps).__name__}")
        own = scorer.default_value if isinstance(scorer.default_value, str) else "q"
        self.scorer, self.value, self.steps = scorer, value or own, steps
        self.tokenizer = tokenizer
        self.exact = isinstance(scorer, Pair) and tokenizer is not None and _tokens_agree(scorer, tokenizer)
        self.__name__ = f"{scorer.name}_{self.value}"  # TRL's name of the reward

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return a reward a completion, in the scorer's unit (of a pair beta * nats).

        Args:
            prompts: B texts, or conversations.
            completions: B texts, or the messages that follow.
            completion_ids: B lists of the sampled tokens.
            log_extra, log_metric: TRL's own.
            columns: the data set's others; not read.

        Raises:
            ValueError: a completion is no answer of the assistant's in text, or is too long for the scorer's models.
        """
        steps = self.step_rewards(prompts, completions, completion_ids)
        rewards = [None if each is None else float(along(self.value, *each)[-1]) for each in steps]
        if log_extra is not None:
            log_extra(
                f"{self.scorer.name} steps", [[] if each is None else [float(r) for r in each[0]] for each in steps]
            )
        every = [float(r) for each in steps if each is not None for r in each[0]]
        if log_metric is not None and every:
            log_metric(f"{self.scorer.name}/step_reward", sum(every) / len(every))
        return rewards

    def step_rewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[tuple[Any, Any] | None]:
        """Return for each completion its steps' rewards [S] and ends [S], or None for one without tokens."""
        texts = [text_of(each) for each in completions]
        ids = [None] * len(texts) if completion_ids is None else [list(each) for each in completion_ids]
        places = [place for place, text in enumerate(texts) if text or (self.exact and ids[place])]
        scored: list[tuple[Any, Any] | None] = [None] * len(texts)
        if not places:
            return scored
        responses = [ids[place] if self.exact else texts[place] for place in places]
        options: dict[str, Any] = {"steps": self.steps}
        if isinstance(self.scorer, Pair):
            options["append_eos"] = [not self.exact and self._complete(ids[place]) for place in places]
        for place, scores in zip(
            places, self.scorer.score([prompts[place] for place in places], responses, **options), strict=True
        ):
            rewards = scores.step_scores if isinstance(scores, StepScores) else scores.step_rewards
            scored[place] = rewards, scores.step_ends
        return scored

    def _complete(self, ids: Sequence[int] | None) -> bool:
        """Return True unless the tokens show that the completion was cut."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return ids is None or eos is None or (len(ids) > 0 and ids[-1] == eos)


class PRIMEReward(PRMReward):
    """A pair as reward, trained online on the outcomes of what it rewards (PRIME, arXiv 2502.01456).

    ``prime = PRIMEReward(pair, label, tokenizer=tokenizer)``, then ``GRPOTrainer(reward_funcs=[prime, ...],
    callbacks=[prime.callback], ...)``. Each call keeps its completions with their labels; at the end of an optimiser
    step the callback gives them to an OnlineUpdater. What evaluation scores is not learnt from.

    Args:
        pair: as of OnlineUpdater. Its tokenizer is the trainer's.
        label: a reward function in TRL's form (prompts=, completions=, and the data set's columns): above 0.5 is right.
        tokenizer: the trainer's processing_class.
        value, steps: see PRMReward.
        options: of OnlineUpdater (learning_rate, every, micro_batch, band, discount, clip).

    Attributes:
        updates: results of the updates so far, the last one last.

    Raises:
        TypeError, ValueError: see PRMReward and OnlineUpdater; or the pair has another tokenizer than the trainer.
    """

    def __init__(
        self,
        pair: ImplicitPRM,
        label: Callable[..., Sequence[float | bool]],
        *,
        tokenizer: Any,
        value: str | None = None,
        steps: StepRule | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pair, tokenizer=tokenizer, value=value, steps=steps)
        if not self.exact:
            raise ValueError("tokenizer: the pair has another one, and is trained on the sampled tokens alone")
        if not callable(label):
            raise TypeError(f"label must be a reward function, got {type(label).__name__}")
        self.label, self.updater = label, OnlineUpdater(pair, **options)
        self.updates: list[Update] = []
        self.callback = _Prime(self)
        self._outcomes: list[Outcome] = []

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return a reward a completion, and keep the outcomes; see PRMReward. Raises ValueError without token ids."""
        if completion_ids is None:
            raise ValueError("completion_ids are needed: the pair is trained on the sampled tokens")
        rewards = super().__call__(prompts, completions, completion_ids, log_extra, log_metric)
        if self.callback.training:
            labels = self.label(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            for prompt, ids, right in zip(prompts, completion_ids, labels, strict=True):
                if len(ids):
                    self._outcomes.append(Outcome(self._prompt_ids(prompt), tuple(ids), float(right) > 0.5))
        return rewards

    def update(self) -> Update | None:
        """Train the pair on the outcomes kept since the last call; None where there are none."""
        outcomes, self._outcomes = self._outcomes, []
        if not outcomes:
            return None
        self.updates.append(self.updater.add(outcomes))
        return self.updates[-1]

    def _prompt_ids(self, prompt: Any) -> tuple[int, ...]:
        asked = Prompt(text=prompt) if isinstance(prompt, str) else Prompt(messages=tuple(prompt))
        return self.scorer.encode_prompt(asked)


class _Prime(TrainerCallback):
    """The update of a PRIMEReward at the end of each optimiser step."""

    def __init__(self, reward: PRIMEReward) -> None:
        self.reward, self.training = reward, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to keep outcomes. Raises ValueError for several processes, whose pairs would drift apart."""
        if args.world_size > 1:
            raise ValueError(f"PRIMEReward trains its pair in one process, and this run has {args.world_size}")
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Train the pair."""
        self.reward.update()
        self.training = not control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep outcomes again: the evaluation is over."""
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep no more outcomes."""
        self.training = False


def text_of(completion: Completion) -> str:
    """Return a completion's text. Raises ValueError for messages that are not one assistant's text, as tool calls."""
    if isinstance(completion, str):
        return completion
    if (
        len(completion) == 1
        and completion[0].get("role") == "assistant"
        and isinstance(completion[0].get("content"), str)
    ):
        return str(completion[0]["content"])
    roles = [message.get("role") for message in completion]
    raise ValueError(f"completions: one text of the assistant's is needed, got messages of {roles}")


def _tokens_agree(scorer: Pair, tokenizer: Any) -> bool:
    if scorer.tokenizer is None:
        scorer.tokenizer = tokenizer
    return TokenizerMatch.of(scorer.tokenizer, tokenizer) == TokenizerMatch(True, True)
