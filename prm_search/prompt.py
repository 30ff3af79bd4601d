"""Prompt: what a search answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """The question of a search: plain text, chat messages, or token ids.

    Args:
        text: plain text, tokenised as it is by the policy.
        messages: chat messages (`{"role": ..., "content": ...}`), rendered by the policy's chat template.
        token_ids: the policy's token ids; given alone, or filled in beside text or messages once tokenised.

    Raises:
        ValueError: nothing was given, text and messages both were, or what was given is empty.
        TypeError: something is of the wrong kind.
    """

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.messages is not None:
            raise ValueError("Prompt takes text or messages, not both")
        if self.text is None and self.messages is None and self.token_ids is None:
            raise ValueError("Prompt needs one of text, messages or token_ids")
        if self.text is not None and not isinstance(self.text, str):
            raise TypeError(f"text must be a str, got {type(self.text).__name__}")
        for name in ("messages", "token_ids"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__")):
                raise TypeError(f"{name} must be a list, got {type(value).__name__}")
        for name in ("text", "messages", "token_ids"):
            value = getattr(self, name)
            if value is not None and len(value) == 0:
                raise ValueError(f"empty prompt: {name} is {value!r}; at least one token is needed")
        if self.messages is not None:
            for message in self.messages:
                if not isinstance(message, Mapping):
                    raise TypeError(f"messages must be dicts with role and content, got {message!r:.80}")
            object.__setattr__(self, "messages", tuple(self.messages))
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", plain_ids(self.token_ids))

    @classmethod
    def of(cls, given: Prompt | str | Sequence[int] | Sequence[Mapping[str, Any]]) -> Prompt:
        """A Prompt from what users pass: a Prompt, a string, chat messages, or token ids."""
        if isinstance(given, Prompt):
            return given
        if isinstance(given, str):
            return cls(text=given)
        # Bytes hold integers too, and sets hold them in no order.
        if hasattr(given, "__iter__") and not isinstance(given, bytes | bytearray | Set | Mapping):
            items: list[Any] = list(given)
            if items and all(isinstance(item, Mapping) for item in items):
                return cls(messages=tuple(items))
            if all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items):
                return cls(token_ids=tuple(int(item) for item in items))
        raise TypeError(
            f"prompt must be a str, a list of token ids or chat messages, or a Prompt, got {type(given).__name__}"
        )

    def with_ids(self, token_ids: Sequence[int]) -> Prompt:
        """The same prompt with its token ids filled in."""
        return replace(self, token_ids=plain_ids(token_ids))


def plain_ids(token_ids: Iterable[Any]) -> tuple[int, ...]:
    """Token ids as plain integers. Raises TypeError for anything that would have to be rounded or read."""
    try:
        return tuple(map(index, token_ids))
    except TypeError as error:
        raise TypeError(f"token_ids must be integers: {error}") from error


def numbered(prompts: Iterable[Prompt]) -> list[tuple[Prompt, int]]:
    """Each prompt with the number of prompts of equal token ids before it: equal ones draw differently."""
    seen: Counter[tuple[int, ...] | None] = Counter()
    pairs = []
    for prompt in prompts:
        pairs.append((prompt, seen[prompt.token_ids]))
        seen[prompt.token_ids] += 1
    return pairs
