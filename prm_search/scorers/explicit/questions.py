"""The question of a prompt, as chat messages that spell no control token."""

from __future__ import annotations

from typing import Any

from ...prompt import Prompt
from .layouts import Spelling


def question_of(name: str, prompt: Prompt, spelling: Spelling) -> list[dict[str, Any]]:
    """Return a prompt as chat messages; plain text is the user's.

    Args:
        name: of the scorer, for the message.
        prompt: text or messages.
        spelling: of the scorer's tokenizer.

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
            message["content"] = spelling.plain(message["content"])
    return messages
