"""A tokenizer that another thread sets to truncate and to pad cuts and pads none of our prompts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from pairs import byte_tokenizer, llama, metaspace_tokenizer

import prm_search as ps
from prm_search.tokens import TokenText, encode_prompt, encode_text
from prm_search.tokens.private_tokenizer import private_tokenizer
from prm_search.tree import Prompt

TEXT = "Then 3 plus 4 makes 7, and 7 plus 8 makes 15."
PROMPTS = [Prompt(text=TEXT), Prompt(messages=({"role": "user", "content": TEXT},))]


def disturbed(tokenizer: Any) -> Any:
    """The tokenizer, whose every call is followed by one of another thread, before its text is encoded."""

    class Shared(type(tokenizer)):  # type: ignore[misc]
        def set_truncation_and_padding(self, *args: Any, **given: Any) -> None:
            super().set_truncation_and_padding(*args, **given)
            other = threading.Thread(target=cut_and_pad, args=(tokenizer._tokenizer,))
            other.start()
            other.join()

    tokenizer.__class__ = Shared
    return tokenizer


def cut_and_pad(backend: Any) -> None:
    backend.enable_truncation(5)
    backend.enable_padding(length=5)


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
def test_prompts_and_responses_come_out_whole(make: Any) -> None:
    calm, shared = make(), disturbed(make())
    assert len(shared(TEXT)["input_ids"]) == 5  # the disturbance works
    for prompt in PROMPTS:
        assert encode_prompt(shared, prompt) == encode_prompt(calm, prompt)
    assert len(encode_prompt(shared, PROMPTS[0])) > 5
    assert encode_text(shared, TEXT) == encode_text(calm, TEXT)
    assert shared.backend_tokenizer.truncation["max_length"] == 5  # the other's settings are left alone


def test_a_policy_and_a_pair_over_a_shared_tokenizer_are_not_disturbed() -> None:
    calm, shared = byte_tokenizer(), disturbed(byte_tokenizer())
    model, reference = llama(1), llama(2)
    for prompt in PROMPTS:
        assert ps.HFPolicy(model, shared).encode(prompt) == ps.HFPolicy(model, calm).encode(prompt)
    ours, theirs = (ps.ImplicitPRM(model, reference, tokenizer=each).score([TEXT], [TEXT]) for each in (shared, calm))
    assert ours[0].q.tolist() == theirs[0].q.tolist()


def test_what_changes_in_the_tokenizer_is_seen() -> None:
    tokenizer = byte_tokenizer()
    twin = private_tokenizer(tokenizer)
    assert twin._tokenizer is private_tokenizer(tokenizer)._tokenizer is not tokenizer._tokenizer
    before = encode_prompt(tokenizer, PROMPTS[1])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert encode_prompt(tokenizer, PROMPTS[1]) == encode_prompt(tokenizer, PROMPTS[0]) != before
    tokenizer.add_tokens(["plus 8"])
    assert encode_prompt(tokenizer, PROMPTS[0]) == tuple(tokenizer(TEXT)["input_ids"])
    assert len(tokenizer) - 1 in encode_prompt(tokenizer, PROMPTS[0])


def test_tokenizers_without_such_a_state_are_used_as_they_are() -> None:
    class Plain:
        all_special_ids = (0,)

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

        def convert_ids_to_tokens(self, token_id: int) -> bytes:
            return bytes([token_id])

    plain = Plain()
    assert private_tokenizer(plain) is plain
    assert encode_text(plain, "ab", TokenText(plain)) == [97, 98]
