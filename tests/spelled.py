"""Policies of every kind that say one text, token by token, and searches with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fake_vllm import FakeAsyncLLM, FakeEngine, FakeLLM
from fakes import FakeAsyncPolicy, FakeBlockingPolicy, FakePolicy, SpelledLM
from pairs import byte_tokenizer, llama

import prm_search as ps
from prm_search.driver.result import Result
from prm_search.engine.decoding_row import DecodingRow
from prm_search.engine.sampler import Sampler
from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMPolicy
from prm_search.search import asearch, search
from prm_search.tree import Prompt

TOKENIZER = byte_tokenizer()
MODEL = llama(0)


class Spelling(Sampler):
    """Draws the tokens of a text, whatever the model says."""

    def __init__(self, text: str) -> None:
        self.script = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]

    def draw(self, logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> list[int]:
        return [self.script[row.position] for row in rows]


POLICIES: dict[str, Callable[[str], Any]] = {
    "fake": lambda text: FakePolicy(SpelledLM(text, top=0.9)),
    "blocking": lambda text: FakeBlockingPolicy(SpelledLM(text, top=0.9)),
    "fake async": lambda text: FakeAsyncPolicy(SpelledLM(text, top=0.9)),
    "hf": lambda text: ps.HFPolicy(MODEL, TOKENIZER, sampler=Spelling(text)),
    "vllm": lambda text: VLLMPolicy(FakeLLM(FakeEngine(SpelledLM(text, top=0.9), burst=2))),
    "async vllm": lambda text: AsyncVLLMPolicy(FakeAsyncLLM(FakeEngine(SpelledLM(text, top=0.9), burst=2))),
}


def found(policy: Any, prompt: Sequence[int] = (5,), **options: Any) -> Result:
    """The result of a search; two greedy samples to the end unless the options say otherwise."""
    options = {"strategy": ps.BestOfN(2), "temperature": 0.0, "max_new_tokens": 200} | options
    prompts = [Prompt(token_ids=tuple(prompt))]
    if hasattr(policy, "advance"):
        return search(prompts, policy=policy, **options)[0]
    return asyncio.run(asearch(prompts, policy=policy, **options))[0]
