"""search, end to end over fakes: prompts, results, usage, progress."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fakes import (
    RULE,
    Child,
    Clock,
    FakeBlockingPolicy,
    FakePolicy,
    FakeScorer,
    ScriptedPolicy,
    ToyLM,
    ids,
    sampling,
    step_scores,
)
from hypothesis import given, strategies as st
from search_cases import ALL, SEEDS, facts, look

from prm_search.driver.budget import Budget
from prm_search.driver.result import Event, Result
from prm_search.driver.search_settings import SearchSettings
from prm_search.protocols import BlockingPolicy, Policy, Request, Scorer
from prm_search.search import SearchLoop, search
from prm_search.steps import StepRule
from prm_search.strategies import DVTS, Beam, BestOfN, Lookahead, Strategy
from prm_search.tree import Prompt, SearchTree
from prm_search.values import Advantage

SCRIPT = {"": ["a;", "d;", "b;", "c;"], "a;": ["a."], "b;": ["c."], "c;": ["d."], "d;": ["b."]}
SCORES = step_scores({"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0})


# -- determinism ------------------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=2), min_size=1, max_size=5)


@given(strategy=ALL, seed=SEEDS, prompts=PROMPTS, random=st.randoms(use_true_random=False))
def test_permuting_prompts_permutes_results(
    strategy: Strategy, seed: int, prompts: list[list[int]], random: Any
) -> None:
    straight = look(prompts, strategy=strategy, seed=seed)
    order = sorted(range(len(prompts)), key=lambda place: random.random())
    found = look([prompts[place] for place in order], strategy=strategy, seed=seed)
    seen: Counter[tuple[int, ...]] = Counter()
    of: dict[tuple[tuple[int, ...], int], object] = {}
    for prompt, result in zip(prompts, straight, strict=True):
        of[tuple(prompt), seen[tuple(prompt)]] = facts(result)
        seen[tuple(prompt)] += 1
    seen.clear()
    for place, result in zip(order, found, strict=True):
        key = tuple(prompts[place])
        assert facts(result) == of[key, seen[key]]  # the n-th of equal prompts is the n-th in both
        seen[key] += 1


@given(strategy=ALL, seed=SEEDS, random=st.randoms(use_true_random=False), rows=st.none() | st.integers(1, 3))
def test_batching_changes_no_token(strategy: Strategy, seed: int, random: Any, rows: int | None) -> None:
    prompts = [[1], [2], [1], [1, 2]]

    def shuffled(children: list[Child]) -> list[Child]:
        return sorted(children, key=lambda child: random.random())

    blocking = look(prompts, FakeBlockingPolicy(), strategy=strategy, seed=seed)
    stepping = look(prompts, FakePolicy(rows=rows, order=shuffled), strategy=strategy, seed=seed)
    assert list(map(facts, blocking)) == list(map(facts, stepping))
    alone = look([[2]], strategy=strategy, seed=seed)
    assert facts(alone[0]) == facts(stepping[1])


def test_seeds_and_occurrences_matter() -> None:
    first, second = look([[1], [1]], strategy=BestOfN(6))
    assert first.candidates != second.candidates
    assert {tuple(n.path_ids()) for n in first.candidates} != {tuple(n.path_ids()) for n in second.candidates}
    (other,) = look([[1]], strategy=BestOfN(6), seed=1)
    assert {tuple(n.path_ids()) for n in first.candidates} != {tuple(n.path_ids()) for n in other.candidates}


def test_zero_temperature_takes_the_most_probable_tokens() -> None:
    lm = ToyLM(sharpness=3.0)
    (result,) = look([[1]], FakePolicy(lm), strategy=BestOfN(3), temperature=0.0)
    assert [node.count for node in result.candidates] == [3]
    context = [1]
    for token in result.token_ids:
        assert token == lm.vocabulary[int(lm.probs(context).argmax())]
        context.append(token)


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result() -> None:
    policy, scorer = ScriptedPolicy(SCRIPT), FakeScorer(SCORES)
    (result,) = look(["?"], policy, scorer, strategy=BestOfN(4), answer=lambda text: text[-1])
    assert result.text == "c;d"
    assert result.token_ids == list(ids("c;d."))
    assert (result.value, result.answer, result.stopped) == (5.0, "d", "finished")
    assert [node.value for node in result.candidates] == [5.0, 4.0, 3.0, 0.0]
    assert result.node is result.candidates[0]
    assert result.tree.prompt.text == "?"
    assert result.tree.prompt.token_ids == ids("?")
    assert result.tree.primary == "prm"
    assert "c;d" in repr(result)


def test_votes() -> None:
    # two paths answer a, with values 0 and 1; one answers d, with 5
    script = {"": ["a;", "b;", "c;"], "a;": ["a."], "b;": ["a."], "c;": ["d."]}
    options = {"strategy": BestOfN(3), "answer": lambda text: text[-1]}
    by = {
        select: look(["?"], ScriptedPolicy(script), FakeScorer(SCORES), select=select, **options)[0]
        for select in ("best", "majority", "weighted")
    }
    assert {select: result.answer for select, result in by.items()} == {"best": "d", "majority": "a", "weighted": "d"}
    majority = by["majority"]
    assert (majority.text, majority.value) == ("b;a", 1.0)  # the best one with that answer
    assert majority.candidates[0] is majority.node
    assert [vote.votes for vote in majority.selection.votes] == [2, 1]
    (hot,) = look(
        ["?"], ScriptedPolicy(script), FakeScorer(SCORES), select="weighted", weight_temperature=100.0, **options
    )
    assert hot.answer == "a"


def test_complete_responses_are_chosen_before_cut_ones() -> None:
    script = {"": ["d;", "a."], "d;": ["d;"], "d;d;": ["d;"], "d;d;d;": ["d;"]}
    (result,) = look(
        ["?"],
        ScriptedPolicy(script),
        FakeScorer(SCORES),
        strategy=Beam(2, 1),
        budget=Budget(depth=3),
        max_new_tokens=99,
    )
    assert (result.text, result.value) == ("a", 0.0)
    assert [(node.path_text(), node.finish) for node in result.candidates] == [("a", "stop"), ("d;d;d;", "budget")]
    assert result.stopped == "depth"


def test_all_candidates_cut_by_length() -> None:
    (result,) = look(
        [[1]], FakePolicy(ToyLM("ab;")), strategy=BestOfN(4), max_new_tokens=5, answer="boxed", select="majority"
    )
    assert {node.finish for node in result.candidates} == {"length"}
    assert {node.end for node in result.candidates} == {5}
    assert result.stopped == "length"
    assert result.answer is None
    assert result.value == max(node.value for node in result.candidates)
    assert result.selection.fallback


def test_a_delimiter_that_is_never_seen() -> None:
    (result,) = look(
        [[1]], FakePolicy(ToyLM("ab.")), strategy=Beam(2, 2), steps=StepRule("\n\n", max_tokens=None), max_new_tokens=9
    )
    assert all(node.depth == 1 for node in result.candidates)


def test_the_context_limits_the_response() -> None:
    results = look([[1] * 3, [1] * 7], FakePolicy(ToyLM("ab;"), context=8), strategy=Beam(2, 2), max_new_tokens=100)
    assert [max(node.end for node in result.tree) for result in results] == [5, 1]
    assert [result.stopped for result in results] == ["length", "length"]


def test_no_scorer() -> None:
    (result,) = search([[1]], policy=FakePolicy(), strategy=Beam(2, 2), steps=RULE, max_new_tokens=12)
    assert {node.value for node in result.candidates} == {0.0}
    assert set(result.usage.encoded_tokens) == set()
    (own,) = search(
        [[1]], policy=FakePolicy(), strategy=BestOfN(3, value=lambda node: -node.end), steps=RULE, max_new_tokens=12
    )
    assert own.value == -min(node.end for node in own.candidates)


def test_values_come_from_the_call_then_the_strategy_then_q() -> None:
    def value(node: Any) -> float:
        return float(node.depth)

    (plain,) = look([[1]], strategy=Beam(2, 2))
    assert all(node.value == node.q for node in plain.tree.nodes[1:])
    (named,) = look([[1]], strategy=Beam(2, 2, value="last"))
    assert all(node.value == node.reward for node in named.tree.nodes[1:])
    (called,) = look([[1]], strategy=Beam(2, 2, value="last"), value=value)
    assert all(node.value == node.depth for node in called.tree.nodes[1:])


def test_a_prover() -> None:
    prover = FakeScorer(name="coach")
    (result,) = look([[1]], strategy=Beam(2, 2), prover=prover)
    for node in result.tree.nodes[1:]:
        assert set(node.rewards) == {"prm", "coach"}
        assert node.value == node.q + node.reward_of("coach")
    (other,) = look([[1]], strategy=Beam(2, 2), prover=prover, value=Advantage(0.5, "coach"))
    assert all(node.value == node.q + 0.5 * node.reward_of("coach") for node in other.tree.nodes[1:])
    tokens = 1 + sum(len(node.token_ids) for node in result.tree)
    assert result.usage.encoded_tokens == dict.fromkeys(("prm", "reference", "coach.prm", "coach.reference"), tokens)


@given(strategy=ALL, seed=SEEDS)
def test_trees_survive_json(strategy: Strategy, seed: int) -> None:
    (result,) = look([[1, 2]], strategy=strategy, seed=seed)
    back = SearchTree.from_json(result.tree.to_json())
    assert back.to_json() == result.tree.to_json()
    assert [n.path_ids() for n in back] == [n.path_ids() for n in result.tree]
    assert [n.value for n in back] == [n.value for n in result.tree]


# -- what it costs ----------------------------------------------------------------------------------------------------


@given(strategy=ALL, seed=SEEDS)
def test_usage_is_exact(strategy: Strategy, seed: int) -> None:
    results = look([[1], [2, 2]], strategy=strategy, seed=seed)
    for result in results:
        nodes = result.tree.nodes[1:]
        # A candidate that a scorer chose for several answers of one stream was told once, and stands for all of them.
        sampled = sum(len(n.token_ids) * len(set(n.lineages)) for n in nodes)
        assert result.usage.sampled_tokens == {"policy": sampled}
        encoded = len(result.tree.prompt_ids) + sum(len(node.token_ids) for node in nodes)
        assert result.usage.encoded_tokens == {"prm": encoded, "reference": encoded}


def test_batch_figures_are_shared() -> None:
    policy, scorer = FakePolicy(), FakeScorer()
    results = look([[1], [2, 2]], policy, scorer, strategy=Beam(2, 2))
    assert results[0].usage.forward_calls == results[1].usage.forward_calls
    assert results[0].usage.seconds == results[1].usage.seconds
    assert results[0].usage.forward_calls == {"policy": policy.forward_calls, "scorer": scorer.calls}
    assert set(results[0].usage.seconds) == {"policy", "scorer"}
    assert all(seconds > 0 for seconds in results[0].usage.seconds.values())


def test_a_shared_model_is_named_once() -> None:
    scorer = FakeScorer()
    scorer.models["reference"] = "toy"
    (result,) = look([[1]], FakePolicy(id="toy"), scorer, strategy=Beam(2, 2))
    assert set(result.usage.encoded_tokens) == {"policy", "prm"}


# -- progress ---------------------------------------------------------------------------------------------------------


def test_events() -> None:
    events: list[Event] = []
    results = look([[1], [2]], strategy=Beam(2, 2), on_event=events.append)
    for place, result in enumerate(results):
        mine = [event for event in events if event.prompt == place]
        assert [event.kind for event in mine[:-1]] == ["steps"] * (len(mine) - 1)
        assert (mine[-1].kind, mine[-1].result) == ("done", result)
        assert {event.tree for event in mine} == {result.tree}
        said = [node for event in mine for node in event.nodes]
        assert sorted(node.index for node in said) == list(range(1, len(result.tree.nodes)))
        assert all(node.value is not None for node in said)


def test_prompts_finish_and_join_independently() -> None:
    policy, scorer = FakePolicy(), FakeScorer()
    settings = SearchSettings.make(strategy=Beam(2, 2), steps=RULE, max_new_tokens=12)
    ended: list[SearchTree] = []
    found: dict[SearchTree, Result] = {}
    joined = None
    with SearchLoop(policy, scorer) as loop:
        short = loop.add(Prompt(token_ids=(1,)), SearchSettings.make(strategy=BestOfN(1), steps=RULE, max_new_tokens=1))
        long = loop.add(Prompt(token_ids=(2,)), settings)
        while loop.active:
            for result in loop.step():
                ended.append(result.tree)
                found[result.tree] = result
                assert result.tree not in policy.trees | scorer.trees
            if joined is None and ended:
                joined = loop.add(Prompt(token_ids=(3,)), settings)
    assert ended[0] is short
    assert set(ended) == {short, long, joined}
    (alone,) = look([[3]], strategy=Beam(2, 2))
    assert facts(alone) == facts(found[joined])
    assert not policy.trees | scorer.trees


def test_cancel_one_of_two() -> None:
    policy, scorer = FakePolicy(ToyLM("ab;;.")), FakeScorer()
    settings = SearchSettings.make(strategy=Beam(2, 2), steps=RULE, max_new_tokens=30)
    with SearchLoop(policy, scorer) as loop:
        trees = [loop.add(Prompt(token_ids=(i,)), settings) for i in (1, 2)]
        for _ in range(3):
            assert loop.step() == []
        result = loop.cancel(trees[0])
        assert (result.stopped, result.tree) == ("cancelled", trees[0])
        assert all(node.finished for node in result.candidates)
        assert trees[0] not in policy.trees | scorer.trees
        assert not any(request.node.tree is trees[0] for request in policy.requests)
        assert loop.cancel(trees[0]) is None
        rest = []
        while loop.active:
            rest += loop.step()
        assert [result.tree for result in rest] == [trees[1]]
    (alone,) = look([[2]], FakePolicy(ToyLM("ab;;.")), strategy=Beam(2, 2), max_new_tokens=30)
    assert facts(alone) == facts(rest[0])


def test_closing_a_loop_drops_what_is_under_way() -> None:
    policy, scorer = FakePolicy(), FakeScorer()
    with SearchLoop(policy, scorer) as loop:
        loop.add(Prompt(token_ids=(1,)), SearchSettings.make(strategy=Beam(2, 2), steps=RULE))
        for _ in range(5):
            loop.step()
        assert policy.trees
    assert not loop.active
    assert not policy.trees | scorer.trees
    assert not policy.requests


def test_committed_steps_of_a_running_search() -> None:
    script = {"": ["d;", "d;"], "d;": ["b;", "b;"], "d;b;": ["a.", "c."]}
    policy = ScriptedPolicy(script)
    with SearchLoop(policy, FakeScorer(SCORES)) as loop:
        tree = loop.add(Prompt(text="?"), SearchSettings.make(strategy=Beam(1, 2), steps=RULE))
        said = []
        while not (results := loop.step()):
            said.append("".join(node.text for node in loop.committed(tree)))
    assert said == ["d;", "d;b;"]
    assert results[0].text == "d;b;c"


def test_time_budget() -> None:
    clock, policy = Clock(), FakePolicy(ToyLM("ab;"))
    with SearchLoop(policy, FakeScorer(), clock=clock) as loop:
        timed = SearchSettings.make(strategy=Beam(2, 2), steps=RULE, budget=Budget(seconds=1), max_new_tokens=500)
        loop.add(Prompt(token_ids=(1,)), timed)
        for _ in range(10):
            assert loop.step() == []
        clock.now = 1.0
        (result,) = loop.step()
    assert result.stopped == "seconds"
    assert policy.forward_calls == 11
    assert {node.finish for node in result.candidates} == {"budget"}


@pytest.mark.parametrize("strategy", [BestOfN(3), Beam(2, 2), DVTS(2), Lookahead(2, 2)])
def test_time_budget_of_a_blocking_policy(strategy: Strategy) -> None:
    with SearchLoop(FakeBlockingPolicy(ToyLM("ab;")), FakeScorer(), clock=Clock(0.05)) as loop:
        loop.add(Prompt(token_ids=(1,)), SearchSettings.make(strategy=strategy, steps=RULE, budget=Budget(seconds=1)))
        while not (results := loop.step()):
            pass
    assert results[0].stopped in ("seconds", "length")
    assert results[0].candidates


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_fakes_and_bases_keep_the_protocols() -> None:
    assert isinstance(FakePolicy(), Policy)
    assert isinstance(FakeBlockingPolicy(), Policy)
    assert isinstance(FakeScorer(), Scorer)
    with pytest.raises(TypeError, match="abstract"):
        BlockingPolicy()


@pytest.mark.parametrize("make", [FakePolicy, FakeBlockingPolicy])
def test_expand_by_hand(make: Callable[[], Any]) -> None:
    policy, tree = make(), SearchTree(Prompt(token_ids=(1,)))
    (children,) = policy.expand([tree.root], 4, sampling=sampling())
    assert len(children) == 4
    assert sum(node.count for node in tree.root.children) == 4
    policy.submit([Request.draw(tree.root, 1, sampling())])
    policy.release(tree)
    assert policy.advance() == []


def test_settings_and_search_have_the_same_defaults() -> None:
    of_search = inspect.signature(search).parameters
    for name, parameter in inspect.signature(SearchSettings.make).parameters.items():
        assert of_search[name].default == parameter.default
        assert of_search[name].kind == parameter.kind
    assert set(of_search) - set(inspect.signature(SearchSettings.make).parameters) == {
        "prompts", "policy", "scorer", "prover", "record", "on_event",
    }  # fmt: skip
