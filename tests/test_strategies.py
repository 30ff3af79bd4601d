"""Strategies against answers worked out by hand, and what all of them have in common."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import pytest
from fakes import RULE, FakePolicy, FakeScorer, ToyLM, fraction, ids
from hypothesis import given, strategies as st
from search_cases import ALL, BEAMS, DVTSS, LETTERS, SEEDS, drawn_paths, merging, nodes_by_text, play, texts

from prm_search.driver.budget import Budget
from prm_search.search import Result, search
from prm_search.strategies import (
    DVTS,
    STRATEGIES,
    Beam,
    BestOfN,
    Expand,
    Lookahead,
    Parallel,
    Steer,
    Strategy,
    resolve_strategy,
)
from prm_search.strategies.base import Run
from prm_search.tree import Node

# -- by hand ----------------------------------------------------------------------------------------------------------

BANDIT = {
    "": ["a;", "d;", "b;", "c;"],
    "d;": ["a;", "a."],
    "c;": ["d;", "b."],
    "d;a;": ["c.", "d."],
    "c;d;": ["a.", "a;"],
    "b;": ["d;"],
}


def test_beam_by_hand() -> None:
    # q: a;0 d;3 b;1 c;2          -> d; c;
    #    d;a;3 d;a.3 c;d;5 c;b.3  -> c;d; d;a; (the first drawn of three threes)
    #    c;d;a.5 c;d;a;5 d;a;c.5 d;a;d.6 -> d;a;d. c;d;a., both finished
    result, policy = play(BANDIT, Beam(width=2, expansions=2))
    assert policy.asked == [("", 4), ("d;", 2), ("c;", 2), ("c;d;", 2), ("d;a;", 2)]
    assert result.text == "d;a;d"
    assert result.value == 6.0
    assert texts(result.candidates) == ["d;a;d", "c;d;a", "d;a;c", "d;a", "c;b"]
    assert result.stopped == "finished"


def test_a_finished_beam_holds_its_slot_until_better_ones_take_it() -> None:
    script = {"": ["d.", "b;"], "b;": ["b;", "a;"], "b;b;": ["a.", "d;"], "b;b;d;": ["a.", "c."], "b;a;": ["a."]}
    # "d." (3) holds one of two slots, so one path goes on at a time; at the end 5 and 7 take both
    result, policy = play(script, Beam(width=2, expansions=1))
    assert policy.asked == [("", 2), ("b;", 1), ("b;b;", 1)]
    assert texts(result.candidates) == ["d", "b;b;a"]
    result, policy = play(script, Beam(width=1, expansions=2))
    assert policy.asked == [("", 2)]  # nothing unfinished is left to go on with
    assert result.text == "d"


def test_the_best_candidate_survives_its_slot() -> None:
    # by last step: "d." leads, is overtaken by better looking steps, and these end badly
    script = {"": ["c.", "d;"], "d;": ["d;"], "d;d;": ["e."]}
    result, _ = play(script, Beam(width=1, expansions=2, value="last"))
    assert result.text == "c"
    assert texts(result.candidates) == ["c", "d;d;e"]


def test_per_parent_spreads_the_slots() -> None:
    script = {
        "": ["d;", "c;", "a;", "a;"], "d;": ["d;", "c;"], "c;": ["a;", "b."],
        "d;d;": ["a."], "d;c;": ["a."],
    }  # fmt: skip
    free, policy = play(script, Beam(width=2, expansions=2))
    assert ("d;d;", 2) in policy.asked
    assert ("d;c;", 2) in policy.asked
    spread, policy = play(script, Beam(width=2, expansions=2, per_parent=1))
    assert ("d;d;", 2) in policy.asked
    assert ("d;c;", 2) not in policy.asked
    assert "c;b" in texts(spread.candidates)
    assert free.text == spread.text == "d;d;a"


@pytest.mark.parametrize("merge", [True, False])
def test_per_parent_takes_duplicates_for_one_parent(merge: bool) -> None:
    scores = {**LETTERS, "f": 5.0, "g": 4.5}
    script = {
        "": ["d;", "d;", "c;", "a;", "a;", "a;"], "d;": ["d;", "a;"], "c;": ["f;", "g;"],
        "d;d;": ["a."], "c;f;": ["a."], "c;g;": ["a."],
    }  # fmt: skip
    # kept: d; d; c; with children 6 3, 6 3 and 7 6.5. One child each of "d;" and "c;", then the best of the rest, 6.5
    _, policy = play(script, Beam(width=3, expansions=2, per_parent=1, merge=merge), scores)
    assert policy.asked[-3:] == [("c;f;", 2), ("c;g;", 2), ("d;d;", 2)]


def test_per_parent_leaves_no_slot_empty() -> None:
    script = {"": ["d;", "c."], "d;": ["d;", "c;", "b;", "a;"], "d;d;": ["a."], "d;c;": ["b."], "d;b;": ["a."]}
    _, policy = play(script, Beam(width=2, expansions=4, per_parent=1))  # root: 8 draws, "d;" four times
    assert policy.asked[1:3] == [("d;", 8), ("d;d;", 8)]


def test_merged_duplicates_fill_as_many_slots_as_they_were_drawn() -> None:
    # four draws of the root, three alike: with two slots, both are "d;" and eight children of it are drawn
    script = {"": ["d;", "d;", "a;", "d;"], "d;": ["a.", "b.", "c."], "a;": ["a."]}
    for merge, asked in ((True, [("", 4), ("d;", 4)]), (False, [("", 4), ("d;", 2), ("d;", 2)])):
        result, policy = play(script, Beam(width=2, expansions=2, merge=merge))
        assert policy.asked == asked
        counts = Counter[str]()
        for node in result.tree.root.children:
            counts[node.path_text()] += node.count
        assert counts == {"d;": 3, "a;": 1}
        assert [n.count for n in result.tree.root.children] == ([3, 1] if merge else [1, 1, 1, 1])


def test_best_of_n_by_hand() -> None:
    script = {"": ["a;", "d;", "a;"], "a;": ["d."], "d;": ["a;"], "d;a;": ["e."]}
    result, policy = play(script, BestOfN(3))
    assert policy.asked == [("", 3)]
    assert texts(result.candidates) == ["a;d", "d;a;e"]
    assert [node.count for node in result.candidates] == [2, 1]
    assert (result.text, result.value) == ("a;d", 3.0)
    by_min, _ = play(script, BestOfN(3, value="min"))
    assert by_min.value == 0.0


def test_lookahead_sees_past_a_step_that_looks_good() -> None:
    script = {"": ["b;", "a;"], "b;": ["a."], "a;": ["d."]}
    greedy, _ = play(script, Beam(width=1, expansions=2))
    assert (greedy.text, greedy.value) == ("b;a", 1.0)
    ahead, _ = play(script, Lookahead(width=1, expansions=2, steps=1, rollouts=1))
    assert (ahead.text, ahead.value) == ("a;d", 3.0)
    node = nodes_by_text(ahead)["a;"]
    assert (node.q, node.value) == (0.0, 3.0)  # its own q stays apart


@pytest.mark.parametrize(("reduce", "values"), [("mean", [1.0, 1.5]), ("max", [3.0, 2.0])])
def test_lookahead_reduces_by_mean_or_max(reduce: str, values: list[float]) -> None:
    scores = {"b": 0.0, "c": 0.0, "d": 3.0, "e": -1.0, "f": 1.0, "g": 2.0}
    script = {"": ["b;", "c;"], "b;": ["d.", "e."], "c;": ["f.", "g."]}
    result, _ = play(script, Lookahead(width=1, expansions=2, rollouts=2, reduce=reduce), scores)
    found = nodes_by_text(result)
    assert [found["b;"].value, found["c;"].value] == values


@pytest.mark.parametrize("merge", [True, False])
def test_lookahead_weighs_rollouts_by_the_policys_probability(merge: bool) -> None:
    """Each different one once: the fake's tokens have a log-probability of -1."""
    script = {"": ["a;"], "a;": ["b;", "ddd;", "b;"]}
    result, _ = play(
        script, Lookahead(width=1, expansions=1, rollouts=3, reduce="policy", merge=merge), budget=Budget(depth=2)
    )
    value = nodes_by_text(result)["a;"].value
    assert value == pytest.approx((1.0 * math.exp(-2) + 9.0 * math.exp(-4)) / (math.exp(-2) + math.exp(-4)))


def test_lookahead_draws_no_rollout_twice() -> None:
    # every step goes on for long; rewards prefer d
    script = {"a;" * k: ["a;"] for k in range(1, 5)}
    script |= {"": ["a;", "a;"], "a;a;a;a;": ["a.", "a."]}
    result, policy = play(script, Lookahead(width=1, expansions=2, steps=2, rollouts=1, merge=False))
    drawn = Counter[str]()
    for text, count in policy.asked:
        drawn[text] += count
    # each kept node: one cached child and one new; the chain of the cached child is only lengthened
    kept = result.tree.root.children[0]
    cached, fresh = kept.children
    assert not cached.rollout
    assert not fresh.rollout
    assert [len(node.children) for node in (kept, cached)] == [2, 2]
    pruned = result.tree.root.children[1]
    assert [child.rollout for child in pruned.children] == [True]
    assert len(pruned.children) == 1


def test_lookahead_cached_children_all_join() -> None:
    # three rollouts of "d;", the winner among them is "c."; the other two are in the next selection as well
    script = {"": ["d;", "e;"], "d;": ["a;", "c.", "b;", "d."], "e;": ["a."], "d;a;": ["a."], "d;b;": ["d."]}
    result, policy = play(script, Lookahead(width=2, expansions=4, rollouts=3))
    drawn = Counter[str]()
    for text, count in policy.asked:
        drawn[text] += count
    assert drawn["d;"] == 4 * 3 + 2 * 1  # "d;" four times: three rollouts each; two are kept: one more child each
    found = nodes_by_text(result)
    assert not found["d;a;"].rollout
    assert not found["d;b;"].rollout
    assert result.text == "d;b;d"


def test_greedy_rollouts_give_the_value_alone() -> None:
    """As in search-and-learn: one rollout a child, of temperature 0, and children that are drawn anew."""
    asks: list[Expand] = []
    drawn: dict[Node, bool] = {}

    class Noted(Lookahead):
        def run(self, root: Node) -> Run:
            inner = super().run(root)
            answer = None
            try:
                while True:
                    ask = inner.send(answer)
                    asks.append(ask)
                    answer = yield ask
                    drawn.update(dict.fromkeys(answer, ask.greedy))
            except StopIteration as end:
                return end.value

    policy = FakePolicy()
    settings = {"scorer": FakeScorer(), "steps": RULE, "max_new_tokens": 12, "temperature": 1.0}
    prompts = [ids(text) for text in ("x", "y", "z", "xy")]
    search(prompts, policy=policy, strategy=Noted(width=2, expansions=3, greedy=True), **settings)
    assert {(ask.rollout, ask.greedy) for ask in asks} == {(True, True), (False, False)}
    grown = [ask.n for ask in asks if not ask.rollout and ask.nodes and ask.nodes[0].parent is not None]
    assert all(set(counts) == {3} for counts in grown)
    greedy = [child for child, most_probable in drawn.items() if most_probable]
    assert len({child.parent for child in greedy}) == len(greedy) > 1
    for rollout in greedy:
        parent = rollout.parent
        assert parent is not None
        (best,) = search(
            [[*rollout.tree.prompt_ids, *parent.path_ids()]], policy=FakePolicy(), strategy=BestOfN(1), steps=RULE,
            max_new_tokens=12 - parent.end, temperature=0.0,
        )  # fmt: skip
        assert list(rollout.token_ids) == best.token_ids[: len(rollout.token_ids)]
    with pytest.raises(ValueError, match="rollouts=2: greedy"):
        Lookahead(rollouts=2, greedy=True)


def test_a_rollout_that_completes_an_answer_makes_a_candidate() -> None:
    # "a;" is never kept, but the answer that its rollout completed was paid for
    script = {"": ["b;", "a;"], "b;": ["d;", "a."], "b;d;": ["e."], "a;": ["c."]}
    result, _ = play(script, Lookahead(width=1, expansions=2))
    assert texts(result.candidates) == ["a;c", "b;a", "b;d;e"]
    assert not any(node.rollout for node in result.candidates[0].path())


def test_dvts_is_a_partition_of_beam() -> None:
    # subtree 1 draws a d, subtree 2 draws b c; each keeps its own best though "d;" is better than both of the others
    script = {"": ["a;", "d;", "b;", "c;"], "d;": ["a.", "b."], "c;": ["a.", "c."]}
    result, policy = play(script, DVTS(subtrees=2, width=1, expansions=2))
    assert policy.asked == [("", 2), ("", 2), ("d;", 2), ("c;", 2)]
    assert texts(result.candidates) == ["d;b", "c;c", "d;a", "c;a"]
    _, policy = play(script, Beam(width=2, expansions=2))
    assert policy.asked == [("", 4), ("d;", 2), ("c;", 2)]


def test_dvts_of_one_subtree_is_beam() -> None:
    for seed in range(5):
        one, beam = (
            run([5], strategy, seed=seed)
            for strategy in (DVTS(subtrees=1, width=3, expansions=2), Beam(width=3, expansions=2))
        )
        assert one.tree.to_json() == beam.tree.to_json()


# -- what a config is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (BestOfN, "n"), (Beam, "width"), (Beam, "expansions"), (Beam, "per_parent"), (DVTS, "subtrees"),
        (DVTS, "width"), (DVTS, "expansions"), (DVTS, "per_parent"), (Lookahead, "width"), (Lookahead, "expansions"),
        (Lookahead, "steps"), (Lookahead, "rollouts"), (Lookahead, "per_parent"), (Steer, "n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True])
def test_strategies_refuse_bad_numbers(kind: type, name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}="):
        kind(**{name: bad})


def test_strategies_refuse_bad_options() -> None:
    with pytest.raises(ValueError, match="reduce='median'"):
        Lookahead(reduce="median")
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha="):
            Steer(alpha)
    for kind in (BestOfN, Beam, DVTS, Lookahead, Steer):
        with pytest.raises(ValueError, match="value='best'"):
            kind(value="best")


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_strategies_are_frozen_and_named(name: str) -> None:
    strategy = resolve_strategy(name)
    assert type(strategy) is STRATEGIES[name]
    assert isinstance(strategy, Strategy)
    assert resolve_strategy(strategy) is strategy
    assert strategy == type(strategy)()
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.value = None


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy='mcst' is unknown; it is one of adaptive_branch, beam, best_of_n"):
        resolve_strategy("mcst")
    for bad in (Beam, None, 4):
        with pytest.raises(TypeError, match="strategy must be"):
            resolve_strategy(bad)


# -- what holds for all of them ---------------------------------------------------------------------------------------


def run(prompt: Sequence[int], strategy: Strategy, *, seed: int = 0, coarse: int = 0, **options: object) -> Result:
    """A search of the toy model; coarse > 0 rounds rewards to that many levels, so that values tie."""

    def reward(prompt: tuple[int, ...], path: tuple[int, ...]) -> float:
        exact = fraction(seed, path) - 0.5
        return round(exact * coarse) / 4 if coarse else exact

    options = {"max_new_tokens": 16, **options}
    policy = FakePolicy(ToyLM(seed=seed))
    (result,) = search(
        [prompt], policy=policy, scorer=FakeScorer(reward), strategy=strategy, steps=RULE, seed=seed, **options
    )
    return result


@given(strategy=ALL, seed=SEEDS, coarse=st.integers(0, 3))
def test_candidates_are_finished_distinct_and_the_best_wins(strategy: Strategy, seed: int, coarse: int) -> None:
    result = run([5], strategy, seed=seed, coarse=coarse, select="best")
    assert result.candidates
    assert all(node.finished and node.value is not None for node in result.candidates)
    assert len(set(result.candidates)) == len(result.candidates)
    complete = [node for node in result.candidates if node.finish == "stop"] or result.candidates
    assert result.value == max(node.value for node in complete)
    kept = {node for node in result.tree.nodes[1:] if node.finished and not node.rollout}
    assert set(result.candidates) == kept  # every finished node that it saw
    assert result.stopped in ("finished", "length")


@given(strategy=st.one_of(BEAMS, DVTSS), seed=SEEDS, coarse=st.integers(0, 3), select=st.sampled_from(["best", "majority", "weighted"]))  # fmt: skip  # noqa: E501
def test_merging_changes_nothing_but_the_number_of_nodes(
    strategy: Strategy, seed: int, coarse: int, select: str
) -> None:
    options = {"seed": seed, "coarse": coarse, "select": select, "max_new_tokens": 12}
    merged = run([5], dataclasses.replace(strategy, merge=True), **options)
    apart = run([5], dataclasses.replace(strategy, merge=False), **options)
    assert drawn_paths(merged.tree) == drawn_paths(apart.tree)
    assert len(merged.tree.nodes) <= len(apart.tree.nodes)
    assert all(node.count == 1 for node in apart.tree.nodes)
    assert merged.usage.sampled_tokens == apart.usage.sampled_tokens
    assert merged.token_ids == apart.token_ids
    assert merged.value == apart.value
    counts = [Counter[tuple[int, ...]]() for _ in range(2)]
    for count, result in zip(counts, (merged, apart), strict=True):
        for node in result.candidates:
            count[tuple(node.path_ids())] += node.count
    assert counts[0] == counts[1]


def test_merging_does_merge() -> None:
    nodes = Counter[bool]()
    for seed in range(5):
        for merge in (True, False):
            nodes[merge] += len(run([5], Beam(3, 3, merge=merge), seed=seed).tree.nodes)
    assert nodes[True] < nodes[False]


@given(n=st.integers(1, 6), seed=SEEDS, coarse=st.integers(0, 3), expand_all=merging)
def test_beam_that_never_prunes_is_best_of_n(n: int, seed: int, coarse: int, expand_all: bool) -> None:
    beam = run([5], Beam(width=n, expansions=1), seed=seed, coarse=coarse)
    best = run([5], BestOfN(n), seed=seed, coarse=coarse)
    assert drawn_paths(beam.tree) == drawn_paths(best.tree)
    assert beam.usage.sampled_tokens == best.usage.sampled_tokens
    assert {(*node.path_ids(), node.count, node.value, node.finish) for node in beam.candidates} == {
        (*node.path_ids(), node.count, node.value, node.finish) for node in best.candidates
    }
    assert beam.value == best.value
    if not coarse:
        assert beam.token_ids == best.token_ids


@given(strategy=ALL, seed=SEEDS)
def test_the_depth_and_node_limits_that_never_bite_change_nothing(strategy: Strategy, seed: int) -> None:
    free = run([5], strategy, seed=seed)
    limited = run([5], strategy, seed=seed, budget=Budget(nodes=10_000, depth=100, tokens=10**6))
    assert drawn_paths(free.tree) == drawn_paths(limited.tree)
    assert texts(free.candidates) == texts(limited.candidates)
    assert [node.count for node in free.candidates] == [node.count for node in limited.candidates]
    assert limited.stopped == free.stopped


def test_a_strategy_is_one_generator() -> None:
    """A strategy of one's own, with the parallel and the sequential half of what they may ask for."""

    class Rejection:
        def run(self, root: Node) -> Run:
            def part() -> Run:
                return (yield Expand([root], 1, until="end"))

            found = yield Parallel([part(), part()])
            ends = [node for nodes in found for node in nodes]
            while max(node.value for node in ends) < 3:
                ends += yield Expand([root], 1, until="end")
            return ends

    result, policy = play({"": ["a.", "b.", "a.", "c.", "d.", "d."]}, Rejection())
    assert texts(result.candidates) == ["d", "c", "b", "a", "a"]
    assert policy.asked == [("", 1)] * 5
