"""One policy, pair or config and several users of it: loops in turns, threads, plain generate beside a search."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import benches
import pytest
import torch
from benches import TOKENIZER, Bench
from fakes import RULE, FakePolicy
from hf_models import STEPS, llama, near, tokenizer
from transformers import LlamaForCausalLM

import prm_search as ps
from prm_search.driver.search_settings import SearchSettings
from prm_search.search import SearchLoop

_shared, bench, own = benches.FIXTURES
PROMPTS = ["2+2=", "hi", "abc", "hello"]
SETTINGS = SearchSettings.make(strategy=ps.Beam(2, 3), steps=STEPS, max_new_tokens=10)


@pytest.fixture
def hurry() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own; their results, or their errors."""
    found: list[Any] = [None] * len(jobs)

    def work(place: int) -> None:
        try:
            found[place] = jobs[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        assert not thread.is_alive()
    return found


def facts(results: list[ps.Result]) -> list[Any]:
    return [
        (r.token_ids, round(r.value or 0.0, 5), r.usage.sampled_tokens, r.usage.encoded_tokens, len(r.tree.nodes))
        for r in results
    ]


def in_turns(*loops: SearchLoop) -> list[list[ps.Result]]:
    """Step the loops in turns until all have ended."""
    results: list[list[ps.Result]] = [[] for _ in loops]
    while any(loop.active for loop in loops):
        for loop, found in zip(loops, results, strict=True):
            if loop.active:
                found += loop.step()
    return results


@pytest.mark.parametrize("strategy", [ps.Beam(2, 3), ps.Lookahead(2, 2), ps.Steer(1.0, n=2)], ids=repr)
def test_threads_share_a_policy_and_a_pair(bench: Bench, hurry: None, strategy: Any) -> None:
    def search() -> list[Any]:
        return [facts(bench.search(PROMPTS, strategy=strategy)) for _ in range(2)]

    alone = search()
    assert together(search, search, search) == [alone] * 3


def test_loops_in_turns_share_a_policy(bench: Bench) -> None:
    def loops() -> list[SearchLoop]:
        made = [SearchLoop(bench.policy, bench.pair) for _ in PROMPTS]
        for loop, text in zip(made, PROMPTS, strict=True):
            loop.add(ps.Prompt(text=text), SETTINGS)
        return made

    alone = [facts(in_turns(loop)[0]) for loop in loops()]
    assert [facts(results) for results in in_turns(*loops())] == alone
    first, second = loops()[:2]
    first.step()
    second.step()
    first.close()  # what another loop has under way stays
    assert facts(in_turns(second)[0]) == alone[1]


def test_a_policy_without_sessions_serves_one_loop() -> None:
    policy = FakePolicy()
    loops = SearchLoop(policy), SearchLoop(policy)
    for token, loop in enumerate(loops):
        loop.add(
            ps.Prompt(token_ids=(token,)), SearchSettings.make(strategy=ps.Beam(2, 2), steps=RULE, max_new_tokens=9)
        )
    with pytest.raises(RuntimeError, match=r"a policy without session\(\) serves one loop at a time"):
        in_turns(*loops)


def test_expanding_by_hand_beside_a_search_and_after_an_error(own: Bench) -> None:
    def expand() -> list[tuple[int, ...]]:
        tree = ps.SearchTree("ab")
        try:
            return [child.token_ids for child in own.policy.expand([tree.root], 3, sampling=SETTINGS.sampling)[0]]
        finally:
            own.policy.release(tree)

    expected = expand()
    with SearchLoop(own.policy, own.pair) as loop:
        loop.add(ps.Prompt(text="hi"), SETTINGS)
        loop.step()
        assert expand() == expected
    calls = iter(range(100))

    def interrupted(*_: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    tree = ps.SearchTree("ab")
    handle = own.model.model.layers[0].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.policy.expand([tree.root], 3, sampling=SETTINGS.sampling)
    handle.remove()
    assert not tree.root.children
    assert own.used == len(tree.prompt_ids)  # the prompt's
    own.policy.release(tree)
    assert expand() == expected


def test_a_reference_that_is_the_policy_belongs_to_one_policy_at_a_time(bench: Bench) -> None:
    """Never the log-probabilities of another policy, which would be silently wrong."""
    pair = ps.ImplicitPRM(bench.trained, "policy", tokenizer=TOKENIZER)
    other = ps.HFPolicy(near(bench.model, 8), TOKENIZER)
    first, second = SearchLoop(bench.policy, pair), SearchLoop(other, pair)
    for loop in (first, second):
        loop.add(ps.Prompt(text="hi"), SETTINGS)
    with pytest.raises(ValueError, match=r"reference='policy': the policy is .*, nodes come from"):
        in_turns(first)
    assert in_turns(second)[0][0].value is not None
    fixed = ps.ImplicitPRM(bench.trained, bench.model, tokenizer=TOKENIZER)  # a reference of its own serves both
    first, second = SearchLoop(bench.policy, fixed), SearchLoop(other, fixed)
    for loop in (first, second):
        loop.add(ps.Prompt(text="hi"), SETTINGS)
    values = [facts(results) for results in in_turns(first, second)]
    assert values[0] == facts(bench.search(["hi"], scorer=fixed, strategy=ps.Beam(2, 3), max_new_tokens=10))
    assert other.lm.tree.used == 0


def test_each_policy_is_read_in_its_own_tokens(bench: Bench) -> None:
    """Whichever was bound last."""
    other = ps.HFPolicy(near(bench.model, 8), tokenizer(reverse=True))

    def loops() -> list[SearchLoop]:
        made = [SearchLoop(policy, bench.pair) for policy in (bench.policy, other)]
        for loop in made:
            loop.add(ps.Prompt(text="hi"), SETTINGS)
        return made

    alone = []
    for policy in (bench.policy, other):
        with SearchLoop(policy, bench.pair) as loop:
            loop.add(ps.Prompt(text="hi"), SETTINGS)
            alone.append(facts(in_turns(loop)[0]))
    assert [facts(results) for results in in_turns(*loops())] == alone
    assert [facts(results) for results in in_turns(*reversed(loops()))] == alone[::-1]
    assert other.lm.tree.used == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_generate_beside_a_search(hurry: None, attention: str) -> None:
    """On the very module that is searched with, and on another that has its config."""
    own = Bench(llama(0))  # transformers' eager attention gives NaN for padded prompts in float64
    own.model.set_attn_implementation(attention)
    torch.manual_seed(3)
    twin = LlamaForCausalLM(own.model.config).eval()
    assert twin.config is own.model.config
    inputs = TOKENIZER(PROMPTS, return_tensors="pt", padding=True)

    def plain(model: Any) -> list[torch.Tensor]:
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return list(out.logits)

    before = [plain(own.model), plain(twin)]
    expected = facts(own.search(PROMPTS))
    over = threading.Event()

    def search() -> list[Any]:
        try:
            return [facts(own.search(PROMPTS)) for _ in range(4)]
        finally:
            over.set()

    def generate(model: Any) -> Callable[[], list[list[torch.Tensor]]]:
        def work() -> list[list[torch.Tensor]]:
            found = [plain(model)]
            while not over.is_set():
                found.append(plain(model))
            return found

        return work

    searched, *generated = together(search, generate(own.model), generate(twin))
    assert searched == [expected] * 4
    for found, logits in zip(generated, before, strict=True):
        assert all(torch.equal(a, b) for each in found for a, b in zip(each, logits, strict=True))
    assert own.used == 0
    assert own.model.config._attn_implementation == attention
