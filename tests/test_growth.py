"""Rows that grow together: whoever takes their slots, and however often, they draw and cost what they would alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import PROMPT, TOKENIZER, check, decoded, policy_of
from models import tiny

import prm_search as ps
from prm_search.engine.language_model import LanguageModel
from prm_search.sampling import Request, Sampling
from prm_search.tree import Prompt, SearchTree


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])  # grouped heads; capped scores in a window; plain ones
def test_rows_whose_slots_are_asked_back_draw_the_same(name: str) -> None:
    plain, counts = decoded(policy_of(4096, name))
    policy = policy_of(4096, name)
    tree = policy.lm.tree

    def stored(turn: int) -> None:
        with tree.lock:
            if turn % 3 == 1:
                for growth in list(tree.growing):
                    growth.store()
            if turn % 6 == 4:
                tree.reserve(tree.capacity)  # and everything is evicted

    again, evicted = decoded(policy, stored)
    check(plain, again)
    key = ("encoded", policy.lm.id)
    assert evicted[key] == counts["encoded", next(k[1] for k in counts if k[0] == "encoded")]
    assert evicted["reencoded", policy.lm.id] > 0


def test_rows_draw_the_same_with_hardly_any_room() -> None:
    plain, counts = decoded(policy_of(4096))
    policy = policy_of(len(PROMPT) + 30)
    again, tight = decoded(policy)
    check(plain, again)
    assert sum(n for (kind, _), n in tight.items() if kind == "encoded") == sum(
        n for (kind, _), n in counts.items() if kind == "encoded"
    )


def test_a_row_at_a_time_draws_the_same() -> None:
    check(decoded(policy_of(4096))[0], decoded(policy_of(4096, max_rows=1))[0])
    check(decoded(policy_of(4096))[0], decoded(policy_of(4096, max_rows=4))[0])


def test_rows_that_grow_cost_one_forward_a_round() -> None:
    """Also where nodes begin in the same round."""
    policy = policy_of(4096)
    rounds: list[int] = []
    decoded(policy, rounds.append)
    assert policy.lm.forwards == len(rounds)


@pytest.mark.parametrize("mode", ["static", "packed"])
def test_static_steps_of_rows_draw_the_same(mode: Any) -> None:
    plain, _ = decoded(policy_of(4096))
    policy = policy_of(4096)
    policy.lm.token_steps.set_mode(mode)
    check(plain, decoded(policy)[0])


@pytest.mark.parametrize("mode", ["auto", "static", "packed"])
def test_a_forward_ahead_of_the_host_changes_no_draw_and_no_count(mode: Any) -> None:
    plain, counts = decoded(policy_of(4096))
    policy = policy_of(4096)
    policy.lm.token_steps.set_mode(mode)
    policy._decoder.ahead = True
    again, ahead = decoded(policy)
    check(plain, again)
    assert [n for (kind, _), n in sorted(counts.items(), key=str)] == [n for _, n in sorted(ahead.items(), key=str)]
    assert 0 < policy.lm.wasted <= 6 + 3 + 2 * (3 + 6)


def test_slots_are_asked_back_between_forwards_that_are_ahead() -> None:
    plain, _ = decoded(policy_of(4096))
    policy = policy_of(4096)
    policy._decoder.ahead = True
    tree = policy.lm.tree

    def stored(turn: int) -> None:
        with tree.lock:
            if turn % 3 == 1:
                tree.reserve(tree.capacity)

    check(plain, decoded(policy, stored)[0])
    tight = policy_of(len(PROMPT) + 30)
    tight._decoder.ahead = True
    check(plain, decoded(tight)[0])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_round_that_fails_takes_its_slots_back(ahead: bool) -> None:
    policy = policy_of(4096, stop_ids=[])
    policy._decoder.ahead = ahead
    tree = SearchTree(Prompt(token_ids=PROMPT))
    policy.submit([Request.draw(tree.root, 3, Sampling(ps.StepRule(None, max_tokens=None)), until="end")])
    for _ in range(3):
        policy.advance()
    used, weight = policy.lm.tree.used, policy.lm.head.linear.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[5] = torch.nan
    if ahead:  # what this one reads was launched before
        policy.advance()
        used = policy.lm.tree.used - 3
    with pytest.raises(ValueError, match="not numbers"):
        policy.advance()
    assert policy.lm.tree.used == used
    with torch.no_grad():
        weight.copy_(kept)
    policy.advance()
    assert policy.lm.tree.used == used + 3 + 3 * ahead
    policy.release(tree)
    assert policy.lm.tree.used == 0


def calls(run: Callable[[], object]) -> int:
    """Python functions that run calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_token_of_a_row_calls_no_python_of_its_own() -> None:
    """A stand-in for time, which tests do not assert: a round in which nothing ends calls as often for any rows."""
    took = {}
    for many in (8, 256):
        policy = policy_of(1 << 15, max_rows=many, stop_ids=[])
        tree = SearchTree(Prompt(token_ids=PROMPT))
        sampling = Sampling(ps.StepRule("\n\n", max_tokens=None), max_new_tokens=100)
        policy.submit([Request.draw(tree.root, many, sampling, until="end", merge=False)])
        for _ in range(20):  # tables have grown, and the automaton knows most tokens
            policy.advance()
        took[many] = min(calls(policy.advance) for _ in range(8))
        policy.release(tree)
    assert took[256] < took[8] + 40
    assert took[256] / 256 < 1


def test_a_decode_loop_calls_less_python_than_generate() -> None:
    """Another stand-in for time: all of a run, its beginning and its end too, beside transformers' own loop."""
    module, rows, tokens = tiny(), 16, 48
    policy = ps.HFPolicy(LanguageModel(module, None, capacity=4096), TOKENIZER, stop_ids=[])
    sampling = Sampling(ps.StepRule("\n\n", max_tokens=None), max_new_tokens=tokens)

    def ours() -> None:
        tree = SearchTree(Prompt(token_ids=PROMPT))
        policy.submit([Request.draw(tree.root, rows, sampling, until="end", merge=False)])
        while not policy.advance():
            pass
        policy.release(tree)

    module.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "num_return_sequences": rows, "pad_token_id": 1}
    ours()  # the forward is recorded, and the automaton knows most tokens
    assert calls(ours) < 0.65 * calls(lambda: module.generate(ids, attention_mask=torch.ones_like(ids), **options))
