"""Prompts as a server that gives text takes them: a text for completions, or messages for a chat."""

from __future__ import annotations

from typing import Any

from ...prompt import Prompt
from .client import Route
from .facts import ServerFacts


class Prompts:
    """Writes prompts for one server.

    Args:
        facts: what the server can do.
        mode: of the policy.
        where: the server and the model, for messages.
        tokenizer: has the chat template; None without one.

    Raises:
        ValueError: the server has no route of the mode, or only chats that it does not continue.
    """

    def __init__(self, facts: ServerFacts, mode: str, where: str, tokenizer: Any) -> None:
        self._facts, self._mode, self._where, self._tokenizer = facts, mode, where, tokenizer
        if mode == "completions" and facts.completions is None:
            raise ValueError(f"mode='completions': {where} has no such route: {facts.reason('completions')}")
        if mode == "chat" and facts.chat is None:
            raise ValueError(f"mode='chat': {where} has no such route: {facts.reason('chat')}")
        if facts.completions is None and facts.chat is None:
            raise ValueError(
                f"base_url: {where} takes neither completions ({facts.reason('completions')}) nor chats "
                f"({facts.reason('chat')})"
            )
        if facts.completions is None and facts.continues is None:
            raise ValueError(f"mode={mode!r}: {self._not_continued()}")

    def write(self, prompt: Prompt) -> tuple[Route, str | None]:
        """The route for a prompt, and its text there; None for a chat, which takes its messages.

        Raises:
            ValueError: the server has no route for it.
        """
        facts = self._facts
        if prompt.text is None and prompt.messages is None:
            raise ValueError(f"the prompt is token ids, and {self._where} is sent text: give it as text or messages")
        if facts.completions is not None and prompt.messages is None:
            return "completions", prompt.text
        if facts.completions is not None and self._tokenizer is not None:
            return "completions", self._rendered(prompt)
        if prompt.messages is None:
            raise ValueError(
                f"the prompt is a text, and mode={self._mode!r} with {self._where} takes chat messages: "
                "[{'role': 'user', 'content': ...}]"
            )
        if facts.chat is None:
            raise ValueError(
                "the prompt is chat messages, and only /completions is used here: give tokenizer= to render them with, "
                f"or the prompt as text (chat: {facts.reason('chat')})"
            )
        if facts.continues is None:
            raise ValueError(f"the prompt is chat messages, and {self._not_continued()}")
        return "chat", None

    def _rendered(self, prompt: Prompt) -> str:
        if getattr(self._tokenizer, "chat_template", "") is None:
            raise ValueError("the policy's tokenizer has no chat template to render chat messages with")
        chat = [dict(message) for message in prompt.messages or ()]
        text = str(self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        return text.removeprefix(self._tokenizer.bos_token or "")  # the server puts it there

    def _not_continued(self) -> str:
        return (
            f"{self._where} continues no partial answer in a chat, by neither continue_final_message nor prefix "
            f"({self._facts.reason('continues')}): a step could not follow another. A server with /completions and "
            "tokenizer= would do, or continuation= where you know better"
        )
