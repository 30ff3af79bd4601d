"""next_token_logprobs of the policies: against plain full forwards and a toy model, with exact counts."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch
from fake_vllm import FakeAsyncLLM, FakeEngine, FakeLLM, install
from fakes import FakePolicy, ToyLM, ids, sampling
from pairs import byte_tokenizer, llama

import prm_search as ps
from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMPolicy
from prm_search.next_token import NextToken, read_words, word_ids
from prm_search.policy import PolicyBase
from prm_search.tokens import TokenText, encode_prompt
from prm_search.tree import Prompt, SearchTree

WORDS = ["a", "step", "5"]


@pytest.fixture(scope="module")
def policy() -> ps.HFPolicy:
    return ps.HFPolicy(llama(3, dtype=torch.float64), byte_tokenizer())


def naive(policy: ps.HFPolicy, text: list[int], words: list[str]) -> list[float]:
    """Log-probabilities of words from one full forward, their tokens found by decoding each."""
    with torch.no_grad():
        table = torch.log_softmax(policy.lm.module(torch.tensor([text])).logits[0, -1], -1)
    spelled = [policy.tokenizer.decode([i]).strip().lower() for i in range(len(policy.tokenizer))]
    return [math.log(sum(math.exp(table[i]) for i, s in enumerate(spelled) if s == word)) for word in words]


def distinct_prefixes(texts: list[list[int]]) -> int:
    return len({tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)})


def test_words_are_a_full_forwards_and_each_token_is_encoded_once(policy: ps.HFPolicy) -> None:
    tree = SearchTree(Prompt(text="any"))
    questions = ["Step 1: add two and three.", "Step 1: add two and four.", "Step 1: add", "Step 1: add two and three."]
    prompts = [Prompt(messages=({"role": "user", "content": question},)) for question in questions]
    asks = [NextToken(tree, prompt, "The answer") for prompt in prompts]
    texts = [
        [*encode_prompt(policy.tokenizer, p), *policy.tokenizer("The answer", add_special_tokens=False)["input_ids"]]
        for p in prompts
    ]
    got = policy.next_token_logprobs(asks[:2], WORDS) + policy.next_token_logprobs(asks[2:], WORDS)
    for answer, text in zip(got, texts, strict=True):
        assert [answer[word] for word in WORDS] == pytest.approx(naive(policy, text, WORDS), abs=1e-9)
    counts = tree.meter.counts
    assert counts["encoded", policy.lm.id] == distinct_prefixes(texts)
    assert counts["reencoded", policy.lm.id] == 0
    begun = NextToken(tree, Prompt(token_ids=tuple(texts[0][:9])))  # the beginning of a known text: its row is gone
    (answer,) = policy.next_token_logprobs([begun], WORDS)
    assert [answer[word] for word in WORDS] == pytest.approx(naive(policy, texts[0][:9], WORDS), abs=1e-9)
    assert counts["encoded", policy.lm.id] == distinct_prefixes(texts)
    assert counts["reencoded", policy.lm.id] == 1
    policy.release(tree)
    assert policy.lm.tree.used == 0


@pytest.mark.parametrize("stop", [False, True])
def test_a_drawn_answer_is_not_encoded_again(policy: ps.HFPolicy, stop: bool) -> None:
    tree = SearchTree(Prompt(messages=({"role": "user", "content": "Is it five?"},)))
    rule = ps.StepRule(delimiter=";", max_tokens=8)
    ((node,),) = policy.expand([tree.root], 1, sampling=sampling(steps=rule, max_new_tokens=12), until="end")
    drawn = list(node.path_ids())
    if stop:  # the same draws, of which the text of the last two is a stop string that is not shown
        for step in node.path():
            step.hidden = 0
        node.hidden = sum(len(TokenText(policy.tokenizer).piece(i)) for i in drawn[-2:])
        drawn = drawn[:-2]
    before = tree.meter.counts["encoded", policy.lm.id]
    ask = NextToken(tree, tree.prompt, "\nIs it correct?", drawn=node)
    (got,) = policy.next_token_logprobs([ask], WORDS)
    tail = policy.tokenizer(ask.answer, add_special_tokens=False)["input_ids"]
    assert tree.meter.counts["encoded", policy.lm.id] - before == len(tail) + (not stop)  # the last drawn one was new
    wanted = naive(policy, [*tree.prompt_ids, *drawn, *tail], WORDS)
    assert [got[word] for word in WORDS] == pytest.approx(wanted, abs=1e-9)
    assert ask.text == node.path_text() + ask.answer
    policy.release(tree)
    assert policy.lm.tree.used == 0


def test_a_small_cache_gives_the_same_numbers() -> None:
    model, tokenizer = llama(3, dtype=torch.float64), byte_tokenizer()
    small = ps.HFPolicy(model, tokenizer, capacity=40)
    tree = SearchTree(Prompt(text="any"))
    texts = ["Step 1: add two and three to get five", "Step 1: add two and four.", "multiply by twenty", "Step 1: add"]
    for text in [*texts, *texts]:
        (got,) = small.next_token_logprobs([NextToken(tree, Prompt(text=text))], WORDS)
        wanted = naive(small, list(encode_prompt(tokenizer, Prompt(text=text))), WORDS)
        assert [got[word] for word in WORDS] == pytest.approx(wanted, abs=1e-9)
    small.release(tree)
    assert small.lm.tree.used == 0


def toy_words(lm: ToyLM, text: str, words: str) -> list[float]:
    probs = dict(zip(lm.vocabulary, lm.probs(ids(text)), strict=True))
    return [math.log(probs.get(ord(word), 1e-9) + probs.get(ord(word.upper()), 1e-9)) for word in words]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_vllm_tells_the_same_and_counts_what_it_had_not_cached(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    install(monkeypatch)
    lm, engine = ToyLM(), FakeEngine(block=4)
    tree = SearchTree(Prompt(text="any"))
    texts = ["abababab", "abababab;;", "abab;a", "abababab"]
    asks = [NextToken(tree, Prompt(text=text[:3]), text[3:]) for text in texts]
    if asynchronous:
        over: Any = FakeAsyncLLM(engine)
        got = asyncio.run(AsyncVLLMPolicy(over).next_token_logprobs(asks, ["a", "b"]))
    else:
        got = VLLMPolicy(FakeLLM(engine)).next_token_logprobs(asks, ["a", "b"])
    for answer, text in zip(got, texts, strict=True):
        assert [answer["a"], answer["b"]] == pytest.approx(toy_words(lm, text, "ab"), abs=1e-6)
    assert [(size, cached) for size, cached, _ in engine.log] == [(8, 0), (10, 8), (6, 4)]
    model = next(model for _, model in tree.meter.counts)
    assert tree.meter.counts["encoded", model] == 8 + 2 + 2
    assert tree.meter.counts["cached", model] == 8 + 4


def test_words_are_found_by_their_text() -> None:
    text = TokenText(byte_tokenizer())
    found = word_ids(text, ["a", "5"], 352)
    assert {text.piece(i).decode() for i in found["a"]} == {"a", "A"}
    assert {text.piece(i).decode().strip().lower() for i in found["a"]} == {"a"}
    assert read_words({" Yes": math.log(0.25), "yes": math.log(0.5), "no.": 0.0}, ["yes", "no"]) == {
        "yes": pytest.approx(math.log(0.75))
    }


def test_what_does_not_fit_is_refused_by_name(policy: ps.HFPolicy) -> None:
    tree = SearchTree(Prompt(text="any"))
    ask = NextToken(tree, Prompt(text="a b"))
    with pytest.raises(ValueError, match="no token of the policy's vocabulary spells 'incomprehensible'"):
        policy.next_token_logprobs([ask], ["incomprehensible"])
    with pytest.raises(ValueError, match="differ in more than case"):
        policy.next_token_logprobs([ask], ["a", "A"])
    with pytest.raises(ValueError, match=r"words\[0\]=' a'"):
        policy.next_token_logprobs([ask], [" a"])
    with pytest.raises(TypeError, match="words='a'"):
        policy.next_token_logprobs([ask], "a")
    with pytest.raises(TypeError, match="answer=3: a str is needed"):
        NextToken(tree, Prompt(text="a"), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="FakePolicy does not"):
        PolicyBase.of(FakePolicy()).next_token_logprobs([ask], ["a"])
    with pytest.raises(ValueError, match="512"):
        policy.next_token_logprobs([NextToken(tree, Prompt(token_ids=(5,) * 510), "a b c d e f g")], ["a"])
    policy.release(tree)
