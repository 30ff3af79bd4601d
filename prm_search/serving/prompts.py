"""Prompts of requests as token ids: refused by their length before they are tokenised, and tokenised off the event
loop, where a text of a megabyte takes seconds and a chat template any time it likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..tokens import TokenText
from ..tokens.private_tokenizer import private_tokenizer
from ..tree import Prompt
from .errors import invalid

# Kept by tokenizers that lose nothing: runs of spaces, controls, unknown characters, words of any length.
_KEPT = "ab" * 200 + "  a \n\n\t b" * 10 + "\u3000\x07é\U0001f600\ue000\u1fff" * 10
# Shortened by the composing normal forms, and by no other form more: a Hangul syllable in three parts.
_COMPOSED = "\u1112\u1161\u11ab" * 30


class PromptLength:
    """The length from which a text cannot fit a model's context, whatever it says.

    Args:
        tokenizer: of the policy; None for a policy that has none.
        token_text: bytes of its tokens.
        context: tokens that prompt and response may have together; None where the policy does not say.

    Attributes:
        most: UTF-8 bytes that a prompt may have; None where nothing can be said, as of a tokenizer that drops spaces.
    """

    def __init__(self, tokenizer: Any, token_text: TokenText, context: int | None) -> None:
        self.most: int | None = None
        if tokenizer is not None and context is not None and hasattr(tokenizer, "__len__"):
            kept, composed = (_bytes_kept(tokenizer, token_text, text) for text in (_KEPT, _COMPOSED))
            if kept >= len(_KEPT.encode()) and composed:
                longest = max(len(token_text.piece(token)) for token in range(len(tokenizer)))
                self.most = context * longest * -(-len(_COMPOSED.encode()) // composed)

    def check(self, prompt: Prompt, param: str) -> None:
        """Refuse a prompt that is too long. A chat counts by its last message, which every template shows.

        Raises:
            RequestError: 400, naming the field.
        """
        text = prompt.text
        if prompt.messages is not None:
            param, text = f"{param}[{len(prompt.messages) - 1}].content", str(prompt.messages[-1]["content"]).strip()
        if self.most is not None and text is not None and len(text.encode("utf-8", "replace")) > self.most:
            raise invalid(param, f"{len(text)} characters: the model's context cannot hold so many")


def _bytes_kept(tokenizer: Any, token_text: TokenText, text: str) -> int:
    """The bytes that the tokens of a text spell."""
    ids = private_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"]
    return sum(len(token_text.piece(token)) for token in ids)


def continued(encode_one: Callable[[Prompt], Prompt], tokenizer: Any, prompt: Prompt) -> Prompt:
    """A chat whose last message is the beginning of the answer, with its token ids.

    Args:
        encode_one: checks a prompt of token ids.
        tokenizer: has the chat template.
        prompt: chat messages.

    Raises:
        ValueError: there is no chat template, or it does not show the last message.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("continue_final_message: the policy has no chat template")
    chat = [dict(message) for message in prompt.messages or ()]
    text = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    ids = private_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"]
    return encode_one(Prompt(token_ids=tuple(map(int, ids))))


def encode(encode_one: Callable[[Prompt], Prompt], prompts: Sequence[Prompt], names: Sequence[str],
           wanted: Callable[[], bool]) -> list[Prompt]:  # fmt: skip
    """Return prompts with the policy's token ids. For any thread.

    Args:
        encode_one: encodes one.
        prompts: to be encoded.
        names: their fields in the request.
        wanted: whether somebody still waits for them, asked before each; if not, the rest is left out.

    Raises:
        RequestError: 400, naming the field of a prompt that cannot have ids. A chat template may raise anything.
    """
    encoded = []
    for prompt, param in zip(prompts, names, strict=True):
        if not wanted():
            break
        try:
            encoded.append(encode_one(prompt))
        except Exception as error:
            if prompt.messages is None and not isinstance(error, ValueError | TypeError):
                raise
            raise invalid(param, str(error) or type(error).__name__) from error
    return encoded
