"""Step scores: every step of worked solutions, scored by a pair. `step_errors` reads them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tree import Prompt
from ..values import VALUES
from .responses import values_of

if TYPE_CHECKING:
    from ..scorers.implicit.implicit_prm import ImplicitPRM

#: The step's own reward, the value of the prefix that it ends, and the same by its length.
SCORES = ("last", "q", "prefix_mean")


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
    scorer: ImplicitPRM,
    delimiter: str = "\n\n",
    values: Sequence[str] = SCORES,
    append_eos: bool = True,
    done: Mapping[int, Mapping[str, Any]] | None = None,
    batch: int = 16,
) -> Iterator[dict[str, Any]]:
    """Score every step of solutions. One record each, in order.

    A solution is scored as one response, its steps joined by the delimiter. A delimiter belongs to the step before it;
    the end of sequence belongs to the last step. Where a step ends is told by characters, so a delimiter inside a step
    ends none.

    Args:
        solutions: see Solution.
        scorer: the pair.
        delimiter: what separates steps; not empty.
        values: names of values.VALUES, each read at the end of every step: "last" is the step's reward, "q" the value
            of the prefix.
        append_eos: whether solutions are complete.
        done: records of an earlier run, by place.
        batch: solutions scored together; changes no score.

    Yields:
        Records: "index", "problem" (the first solution to the same prompt), "label", "tokens", and "scores", for each
        value one number a step.

    Raises:
        ValueError: an argument is out of range; a step shares its last token with the next one; or the pair cannot
            score a solution. The message names the solution.
    """
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
    scorer: ImplicitPRM,
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
        cut = []
        for index in places:
            try:
                cut.append(encode_steps(scorer, solutions[index].steps, delimiter, append_eos))
                _fits(scorer, solutions[index].prompt, len(cut[-1][0]))
            except ValueError as error:
                raise ValueError(f"solutions[{index}]: {error}") from error
        try:
            scored = scorer.score(
                [solutions[index].prompt for index in places], [ids for ids, _ in cut], steps=[ends for _, ends in cut]
            )
        except ValueError as error:
            named = re.match(r"(?:prompts|responses)\[(\d+)\]:? ", str(error))
            if named is None:
                raise
            raise ValueError(f"solutions[{places[int(named[1])]}]: {str(error)[named.end() :]}") from error
        for index, scores in zip(places, scored, strict=True):
            yield {
                "index": index,
                "problem": first[_asked(solutions[index].prompt)],
                "label": solutions[index].label,
                "tokens": len(scores.token_ids),
                "scores": {value: [float(f"{score:.7g}") for score in values_of(scores, value)] for value in values},
            }


def _fits(scorer: ImplicitPRM, prompt: Prompt, tokens: int) -> None:
    """Raises ValueError where prompt and response exceed the pair's context, or the prompt cannot be encoded."""
    ids = scorer.encode_prompt(prompt)
    if scorer.context is not None and len(ids) + tokens > scorer.context:
        raise ValueError(f"{len(ids) + tokens} tokens with its prompt exceed the pair's context of {scorer.context}")


def _asked(prompt: Prompt) -> Any:
    return prompt.text, prompt.token_ids, repr(prompt.messages)


def encode_steps(
    scorer: ImplicitPRM, steps: Sequence[str], delimiter: str, append_eos: bool
) -> tuple[list[int], list[int]]:
    """Token ids of steps joined by a delimiter, and how many of them there are up to each step's end.

    A step ends with the token that completes the delimiter behind it.

    Raises:
        ValueError: two steps end in the same token, or the tokenizer does not spell the text.
    """
    from ..pieces import text_pieces
    from ..tokens import encode_text

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
