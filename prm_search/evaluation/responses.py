"""Responses that exist already: scored and chosen among as fresh samples are, as arXiv 2412.01981 evaluates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..answers import Answer, resolve_answer
from ..problems import final_answer
from ..scorers.scores import Scores
from ..tree import Prompt, SearchTree
from ..usage import Usage
from ..values import along
from .plan import OWN, VOTES, Plan, own_value
from .samples import Cost, Judge, Sample, record_of

if TYPE_CHECKING:
    from ..scorers.base import ScorerBase


@dataclass(frozen=True)
class Response:
    """A response to score.

    Attributes:
        text: without special tokens.
        token_ids: its tokens where they are known, the end of sequence included; None to encode the text.
        right: its label, or None to ask the judge.
        cut: it ended at a length, so it has no end of sequence and, unless labelled, is wrong.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    right: bool | None = None
    cut: bool = False


@dataclass(frozen=True)
class Answered:
    """A problem with its responses, in the order in which N takes them.

    Attributes:
        prompt: what was asked.
        responses: at least as many as the largest budget.
        answer: the right answer, for responses without a label; None where all have one.
    """

    prompt: Prompt
    responses: Sequence[Response]
    answer: str | None = None


def evaluate_responses(
    problems: Sequence[Answered],
    *,
    scorers: ScorerBase | Sequence[ScorerBase],
    plan: Plan,
    judge: Judge | None = None,
    answer: str | Answer | None = None,
    done: Mapping[int, dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Choose among responses that exist: best_of_n, weighted and majority at every budget. One record a problem.

    Args:
        problems: see Answered; only the first responses, up to the largest budget, are scored.
        scorers: pairs, step PRMs and outcome models, of distinct names; those that are no pairs read the responses'
            text.
        plan: of strategies that vote only; its seeds and sampling play no part, its `steps` cut the responses.
        judge, answer: as of `evaluate`; the judge is asked of responses without a label.
        done: records of an earlier run, by the problem's place.

    Yields:
        Records as evaluate's of samples, with seed 0 and without seconds of sampling. Tokens are the first pair's.

    Raises:
        ValueError: a problem has too few responses, or neither labels nor a judge and an answer; the plan has a
            strategy that samples; scorers are missing or of one name; or a response does not suit a pair (the message
            names the problem).
    """
    pairs = list(scorers) if isinstance(scorers, Sequence) else [scorers]
    check_responses(problems, [pair.name for pair in pairs], plan, judge)
    extract = resolve_answer(answer) or final_answer
    missing = ((index, problem) for index, problem in enumerate(problems) if index not in (done or {}))
    return response_records(missing, pairs, plan, judge, extract)


def check_responses(problems: Sequence[Answered], names: Sequence[str], plan: Plan, judge: Judge | None) -> None:
    """Raises ValueError where problems, names of scorers, plan and judge do not suit; see evaluate_responses."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"scorers are named {list(names)}: at least one is needed, each with a name of its own")
    odd = [name for name in plan.strategies if name not in VOTES]
    if odd:
        raise ValueError(f"strategies: {', '.join(odd)} would sample; responses that exist take {', '.join(VOTES)}")
    for index, problem in enumerate(problems):
        if len(problem.responses) < plan.most:
            raise ValueError(
                f"problems[{index}] has {len(problem.responses)} responses; a budget of {plan.most} needs as many"
            )
        if (judge is None or problem.answer is None) and any(response.right is None for response in problem.responses):
            raise ValueError(f"problems[{index}]: a response has no label, and there is no right answer to judge it by")


def response_records(
    problems: Iterable[tuple[int, Answered]],
    pairs: Sequence[ScorerBase],
    plan: Plan,
    judge: Judge | None,
    extract: Answer,
) -> Iterator[dict[str, Any]]:
    """The records of some problems, each with its place in the whole list; see evaluate_responses."""
    for index, problem in problems:
        responses = problem.responses[: plan.most]
        costs: dict[str, Cost] = {}
        values: list[dict[str, dict[str, float]]] = [{} for _ in responses]
        tokens: list[int] = []
        for scorer in pairs:
            score = _score_tokens if scorer.rewards_tokens else _score_texts
            try:
                counts, numbers, costs[scorer.name] = score(scorer, problem.prompt, responses, plan)
            except ValueError as error:
                raise ValueError(f"problems[{index}]: {error}") from error
            tokens = tokens or counts
            for response_values, own in zip(values, numbers, strict=True):
                response_values[scorer.name] = own
        samples = []
        for response, count, response_values in zip(responses, tokens, values, strict=True):
            right = response.right
            if right is None:
                right = not response.cut and judge is not None and judge(response.text, str(problem.answer))[1]
            vote = None if response.cut else extract(response.text) or None
            finish = "length" if response.cut else "stop"
            samples.append(Sample(response.text, vote, bool(right), count, count, finish, response_values))
        prompt_tokens = max(0, costs[pairs[0].name].prm_tokens - sum(tokens))
        record = record_of(samples, costs, plan, prompt_tokens=prompt_tokens)
        yield {"index": index, "kind": "samples", "problem": index, "seed": 0, **record}


# Tokens of each response, its numbers by value, and what all of them cost.
_Scored = tuple[list[int], list[dict[str, float]], Cost]


def _score_tokens(scorer: Any, prompt: Prompt, responses: Sequence[Response], plan: Plan) -> _Scored:
    """Score responses by a pair: the very tokens that were sampled, where they are known."""
    ids = scorer.encode_prompt(prompt)
    began = perf_counter()
    scores: Sequence[Scores] = scorer.score(
        [Prompt(token_ids=ids)] * len(responses),
        [response.text if response.token_ids is None else response.token_ids for response in responses],
        steps=plan.steps,
        append_eos=[not response.cut for response in responses],
    )
    seconds = perf_counter() - began
    tokens = [len(response_scores.token_ids) for response_scores in scores]
    encoded = len(ids) + sum(tokens)  # equal prompts are one tree, nothing else is shared
    numbers = [
        {value: float(values_of(response_scores, "q" if value == OWN else value)[-1]) for value in plan.values}
        for response_scores in scores
    ]
    return tokens, numbers, Cost(encoded, 0 if scorer.reference is None else encoded, seconds)


def _score_texts(scorer: ScorerBase, prompt: Prompt, responses: Sequence[Response], plan: Plan) -> _Scored:
    """Score responses by a scorer that reads text: cut into steps where it scores steps, otherwise whole."""
    from ..scorers.explicit.step_scores import plant_text

    if prompt.text is None and prompt.messages is None:
        raise ValueError(f"{scorer.name!r} reads text, and the prompt is given only as token ids")
    tree = SearchTree(prompt)
    tree.primary = scorer.name
    rule = None if scorer.whole else plan.steps
    began = perf_counter()
    try:
        ends = [plant_text(scorer, tree, place, response.text, rule) for place, response in enumerate(responses)]
        scorer.score_exact(ends)
        seconds = perf_counter() - began
        usage = Usage.read(tree.meter, scorer.models)
    finally:
        scorer.release(tree)
    numbers = [{value: float(own_value(value, scorer)(end)) for value in plan.values} for end in ends]
    return [end.end for end in ends], numbers, Cost.of(usage, scorer.models, seconds)


def values_of(scores: Scores, value: str) -> np.ndarray:
    """A value at the end of every step of a scored response: [S] float64."""
    starts = [0, *scores.step_ends[:-1]]
    rewards = [
        scores.token_rewards[begin:end].sum(dtype=np.float64)
        for begin, end in zip(starts, scores.step_ends, strict=True)
    ]
    return along(value, rewards, scores.step_ends)
