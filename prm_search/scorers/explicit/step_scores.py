"""StepScores: an explicit scorer's numbers for one complete response, and how responses are read for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...checks import integer
from ...steps import StepRule
from ...tokens import encode_text
from ...tree import Node, Prompt, SearchTree
from ...values import resolve_value

if TYPE_CHECKING:
    from ..base import ScorerBase


@dataclass(frozen=True, eq=False)
class StepScores:
    """Scores of a response's steps.

    Attributes:
        step_scores: [S] fp32, one a step.
        step_ends: [S] int64, tokens of the response up to each step's end, in the scorer's tokens.
        reward: of the whole response: the steps' by the scorer's default value.
        texts: S strings, the steps' texts; joined they are the response.
        reward_range: the least and the most that a score can be; None for no bounds.
        notes: what a reader should know, in sentences, such as that a path beyond the scorer's length kept a score.
    """

    step_scores: np.ndarray
    step_ends: np.ndarray
    reward: float
    texts: tuple[str, ...] = ()
    reward_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def score_texts(
    scorer: ScorerBase,
    prompts: Iterable[Any],
    responses: Iterable[Any],
    *,
    steps: Any,
    batch_tokens: int,
    whole: bool = False,
) -> list[StepScores]:
    """Score texts; see StepPRM.score. `whole` takes each as one finished step."""
    integer("batch_tokens", batch_tokens, 1, "at least 1 token, a whole number,")
    if steps is not None and not isinstance(steps, StepRule):
        raise TypeError(
            f"steps must be a StepRule, got {type(steps).__name__}: give steps of your own as lists of texts"
        )
    prompt_list, answers = _listed("prompts", prompts), _listed("responses", responses)
    if len(prompt_list) != len(answers):
        raise ValueError(
            f"prompts has {len(prompt_list)} entries and responses {len(answers)}: one prompt a response is needed"
        )
    trees: dict[Any, SearchTree] = {}
    ends: list[Node] = []
    for place, (prompt, response) in enumerate(zip(prompt_list, answers, strict=True)):
        tree = _tree(trees, place, prompt)
        tree.primary = scorer.name
        ends.append(plant_text(scorer, tree, place, response, None if whole else steps or StepRule()))
    try:
        for batch in _batches(ends, batch_tokens):
            scorer.score_exact(batch)
        return [scores_of(scorer, end) for end in ends]
    finally:
        for tree in trees.values():
            scorer.release(tree)


def scores_of(scorer: ScorerBase, end: Node) -> StepScores:
    """Return the scores of a path that a scorer has scored."""
    path = end.path()
    return StepScores(
        np.array([step.reward_of(scorer.name) for step in path], np.float32),
        np.array([step.end for step in path], np.int64),
        resolve_value(scorer.default_value or "last")(end),
        tuple(step.text for step in path),
        scorer.reward_range,
        scorer.notes_of(end),
    )


def _listed(name: str, items: Any) -> list[Any]:
    if isinstance(items, str | bytes | Prompt) or not isinstance(items, Iterable):
        raise TypeError(f"{name} must be a list, one entry a response, got {type(items).__name__}: wrap it in a list")
    return list(items)


def _tree(trees: dict[Any, SearchTree], place: int, entry: Any) -> SearchTree:
    """Return the tree of a prompt; equal ones share theirs."""
    try:
        prompt = Prompt.of(entry)
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"prompts[{place}]: {error}") from error
    if prompt.text is None and prompt.messages is None:
        raise ValueError(f"prompts[{place}]: text or chat messages are needed, not token ids")
    key = repr((prompt.text, prompt.messages))
    return trees.setdefault(key, SearchTree(prompt))


def plant_text(scorer: ScorerBase, tree: SearchTree, place: int, response: Any, rule: StepRule | None) -> Node:
    """Add a finished response to its prompt's tree, a node a step, and return its end.

    Args:
        scorer: whose tokens count a step's length.
        tree: of the prompt.
        place: of the response, for messages.
        response: a text, or with a rule a list of texts, a step each.
        rule: cuts a text into steps; None for one step.

    Raises:
        TypeError: response is neither.
        ValueError: it is empty.
    """
    tokenizer, text = scorer.need_tokenizer(), scorer.token_text
    node = tree.root
    if isinstance(response, str):
        ids = encode_text(tokenizer, response, text)
        cuts = ([len(ids)] if rule is None else rule.ends(ids, text.piece)) if ids else []
        parts = [ids[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
        for part in parts:
            node = tree.add(node, part, text=text.text_bytes(part))
    elif rule is not None and isinstance(response, Sequence) and all(isinstance(step, str) for step in response):
        for step in response:
            part = encode_text(tokenizer, step, text)
            node = tree.add(node, part, text=step) if part else node
    else:
        allowed = "a text" if rule is None else "a text or a list of texts, a step each"
        raise TypeError(f"responses[{place}] must be {allowed}, got {response!r:.80}")
    if node is tree.root:
        raise ValueError(f"responses[{place}] is empty: at least one step is needed")
    node.finish = "stop"
    return node


def _batches(ends: Sequence[Node], batch_tokens: int) -> Iterable[list[Node]]:
    batch: list[Node] = []
    size = 0
    for end in ends:
        if batch and size + end.end > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(end)
        size += end.end
    if batch:
        yield batch
