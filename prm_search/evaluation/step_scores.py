"""Step scores: every step of worked solutions, scored by a pair or a step PRM. `step_errors` reads them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tree import Prompt
from ..values import VALUES, along
from .responses import values_of

if TYPE_CHECKING:
    from ..scorers.base import ScorerBase

#: Of a pair: the step's own reward, the value of the prefix that it ends, and the same by its length.
SCORES = ("last", "q", "prefix_mean")
#: Of a step PRM: the step's score.
STEP_SCORES = ("last",)


@dataclass(frozen=True)
class Solution:
    """A worked solution.

    Attributes:
        prompt: the problem.
        steps: their texts, without what separates them.
        label: place of the first wrong step; -1 for none.
    """

    prompt: Prompt
    steps: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        if not self.steps or not all(isinstance(step, str) and step for step in self.steps):
            raise ValueError("steps: at least one text is needed, and none that is empty")
        if isinstance(self.label, bool) or not isinstance(self.label, int) or not -1 <= self.label < len(self.steps):
            raise ValueError(
                f"label={self.label!r}: the place of a step, 0 to {len(self.steps) - 1}, or -1 for none is needed"
            )


def score_steps(
    solutions: Sequence[Solution],
    *,
    scorer: ScorerBase,
    delimiter: str = "\n\n",
    values: Sequence[str] | None = None,
    append_eos: bool = True,
    done: Mapping[int, Mapping[str, Any]] | None = None,
    batch: int = 16,
) -> Iterator[dict[str, Any]]:
    """Score every step of solutions. One record each, in order.

    A pair scores a solution as one response, its steps joined by the delimiter. A delimiter belongs to the step before
    it; the end of sequence belongs to the last step. Where a step ends is told by characters, so a delimiter inside a
    step ends none. A step PRM is given the steps as they are, and writes them in its own format.

    Args:
        solutions: see Solution.
        scorer: a pair or a step PRM.
        delimiter: what separates steps for a pair; not empty.
        values: names of values.VALUES, each read at the end of every step: "last" is the step's reward, "q" the value
            of the prefix. None for `SCORES` of a pair, `STEP_SCORES` of a step PRM.
        append_eos: whether a pair's solutions are complete.
        done: records of an earlier run, by place.
        batch: solutions scored together; changes no score.

    Yields:
        Records: "index", "problem" (the first solution to the same prompt), "label", "tokens", and "scores", for each
        value one number a step.

    Raises:
        TypeError: scorer judges whole answers, not steps.
        ValueError: an argument is out of range; a step shares its last token with the next one; or the pair cannot
            score a solution. The message names the solution.
    """
    if scorer.whole:
        raise TypeError(f"scorer={scorer.name!r} is an {scorer.kind}: it judges whole answers, and has no step scores")
    if values is None:
        values = SCORES if scorer.rewards_tokens else STEP_SCORES
    unknown = [value for value in values if value not in VALUES]
    if unknown or not values:
        raise ValueError(f"values={list(values)!r}: names among {', '.join(VALUES)} are needed")
    if not delimiter:
        raise ValueError("delimiter is empty: what separates steps is needed")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: an integer >= 1 is needed")
    return _score(list(solutions), scorer, delimiter, tuple(values), append_eos, done or {}, batch)


def _score(
    solutions: Sequence[Solution],
    scorer: ScorerBase,
    delimiter: str,
    values: Sequence[str],
    append_eos: bool,
    done: Mapping[int, Mapping[str, Any]],
    batch: int,
) -> Iterator[dict[str, Any]]:
    first: dict[Any, int] = {}
    for index, solution in enumerate(solutions):
        first.setdefault(_asked(solution.prompt), index)
    waiting = [index for index in range(len(solutions)) if index not in done]
    for begin in range(0, len(waiting), batch):
        places = waiting[begin : begin + batch]
        numbers = _pair_scores if scorer.rewards_tokens else _text_scores
        for index, (tokens, scores) in zip(
            places, numbers(solutions, places, scorer, delimiter, values, append_eos), strict=True
        ):
            yield {
                "index": index,
                "problem": first[_asked(solutions[index].prompt)],
                "label": solutions[index].label,
                "tokens": tokens,
                "scores": {value: [float(f"{score:.7g}") for score in row] for value, row in scores.items()},
            }


def _pair_scores(
    solutions: Sequence[Solution],
    places: Sequence[int],
    scorer: Any,
    delimiter: str,
    values: Sequence[str],
    append_eos: bool,
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Tokens and scores of each solution under a pair."""
    cut = []
    for index in places:
        try:
            cut.append(encode_steps(scorer, solutions[index].steps, delimiter, append_eos))
            _fits(scorer, solutions[index].prompt, len(cut[-1][0]))
        except ValueError as error:
            raise ValueError(f"solutions[{index}]: {error}") from error
    with _named(places):
        scored = scorer.score(
            [solutions[index].prompt for index in places], [ids for ids, _ in cut], steps=[ends for _, ends in cut]
        )
    return [(len(scores.token_ids), {value: values_of(scores, value) for value in values}) for scores in scored]


def _text_scores(
    solutions: Sequence[Solution],
    places: Sequence[int],
    scorer: Any,
    delimiter: str,
    values: Sequence[str],
    append_eos: bool,
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Tokens and scores of each solution under a step PRM."""
    with _named(places):
        scored = scorer.score(
            [solutions[index].prompt for index in places], [list(solutions[index].steps) for index in places]
        )
    for index, scores in zip(places, scored, strict=True):
        if len(scores.step_scores) != len(solutions[index].steps):
            raise ValueError(f"solutions[{index}]: a step has no tokens under {scorer.name!r}'s tokenizer")
    return [
        (int(scores.step_ends[-1]), {value: along(value, scores.step_scores, scores.step_ends) for value in values})
        for scores in scored
    ]


@contextmanager
def _named(places: Sequence[int]) -> Iterator[None]:
    """Let an error of some solutions name the one among all."""
    try:
        yield
    except ValueError as error:
        entry = re.match(r"(?:prompts|responses)\[(\d+)\]:? ", str(error))
        if entry is None:
            raise
        raise ValueError(f"solutions[{places[int(entry[1])]}]: {str(error)[entry.end() :]}") from error


def _fits(scorer: ScorerBase, prompt: Prompt, tokens: int) -> None:
    """Raises ValueError where prompt and response exceed the pair's context, or the prompt cannot be encoded."""
    ids = scorer.encode_prompt(prompt)
    if scorer.context is not None and len(ids) + tokens > scorer.context:
        raise ValueError(f"{len(ids) + tokens} tokens with its prompt exceed the pair's context of {scorer.context}")


def _asked(prompt: Prompt) -> Any:
    return prompt.text, prompt.token_ids, repr(prompt.messages)


def encode_steps(
    scorer: ScorerBase, steps: Sequence[str], delimiter: str, append_eos: bool
) -> tuple[list[int], list[int]]:
    """Token ids of steps joined by a delimiter, and how many of them there are up to each step's end.

    A step ends with the token that completes the delimiter behind it.

    Raises:
        ValueError: two steps end in the same token, or the tokenizer does not spell the text.
    """
    from ..tokens import encode_text
    from ..tokens.pieces import text_pieces

    for form in ("", "NFC", "NFKC"):  # some tokenizers normalise
        parts = [unicodedata.normalize(form, step) if form else step for step in steps]  # type: ignore[arg-type]
        parts = [part + delimiter for part in parts[:-1]] + parts[-1:]
        ids = encode_text(scorer.need_tokenizer(), "".join(parts), scorer.token_text)
        pieces = text_pieces(ids, scorer.token_text.piece)
        if "".join(pieces) == "".join(parts):
            break
    else:
        raise ValueError("the pair's tokenizer does not spell its text, so its steps cannot be told apart")
    written = np.cumsum([len(piece) for piece in pieces])
    ends = [int(end) + 1 for end in np.searchsorted(written, np.cumsum([len(part) for part in parts]), "left")]
    ends[-1] = len(ids)
    if append_eos and scorer.eos_token_id is not None:
        ids.append(scorer.eos_token_id)
        ends[-1] += 1
    if any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"two steps end in one token (ends {ends}): is {delimiter!r} the right delimiter?")
    return ids, ends
