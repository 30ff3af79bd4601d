"""The question of a prompt, as chat messages that spell no control token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...prompt import Prompt


def question_of(name: str, prompt: Prompt, plain: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return a prompt as chat messages; plain text is the user's.

    Args:
        name: of the scorer, for the message.
        prompt: text or messages.
        plain: breaks up control tokens that a text spells; see Spelling.plain.

    Raises:
        ValueError: the prompt is given only as token ids.
    """
    if prompt.messages is not None:
        messages = [dict(message) for message in prompt.messages]
    elif prompt.text is not None:
        messages = [{"role": "user", "content": prompt.text}]
    else:
        raise ValueError(
            f"{name!r} writes the question in its own format, and the prompt is given only as token ids: give it as "
            "text or chat messages (in generate: PRMGuidance(prompts=...))"
        )
    for message in messages:
        if isinstance(message.get("content"), str):
            message["content"] = plain(message["content"])
    return messages
