"""Cross-prompt negatives: responses to other problems as wrong ones to this. No torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .data import LabelledResponse

_DRAWS = 100  # for one negative, before it is given up


def cross_prompt(
    rows: Sequence[LabelledResponse], ratio: float, seed: int = 0, max_length: int | None = None
) -> list[LabelledResponse]:
    """Rows that join the prompt of a row with the response to another prompt, labelled wrong.

    However good a response, it does not answer another question. A model that learns from such negatives cannot live on
    what good responses to all questions have in common, such as length or form. The source is the augmentation of arXiv
    2409.13156 (RRM), here for outcome labels. Of its triplets we take a response to the prompt and one to another
    prompt.

    Args:
        rows: with at least two prompts.
        ratio: negatives for each row. Every row's prompt gets `floor(ratio)` of them for it, and the rest go to rows
            drawn without replacement.
        seed: of the choice.
        max_length: tokens of a negative at most. Where no response is found that fits and that the prompt has not
            itself, there is one negative less.

    Raises:
        ValueError: ratio is negative or not finite, or there is only one prompt.
    """
    if not 0 <= ratio < float("inf"):
        raise ValueError(f"negatives={ratio!r}: a finite number >= 0 is needed")
    count = round(ratio * len(rows))
    if not count:
        return []
    if len({row.prompt_ids for row in rows}) < 2:
        raise ValueError("negatives: responses to two problems at least are needed")
    rng = random.Random(f"negatives/{seed}")
    own = {(row.prompt_ids, row.response_ids.tobytes()) for row in rows}
    order = list(rows)
    rng.shuffle(order)
    negatives = []
    for index in range(count):
        prompt = order[index % len(order)].prompt_ids
        for _ in range(_DRAWS):
            other = rng.choice(rows)
            made = LabelledResponse(prompt, other.response_ids, False)
            fits = max_length is None or len(made) <= max_length
            if fits and (prompt, made.response_ids.tobytes()) not in own:
                negatives.append(made)
                break
    return negatives
