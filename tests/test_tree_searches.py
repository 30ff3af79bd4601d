"""MCTS, Rebase and AdaptiveBranch against searches worked out by hand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import pytest
from fakes import RULE, FakePolicy, FakeScorer, ToyLM
from search_cases import play, texts

from prm_search.search import search
from prm_search.strategies import MCTS, AdaptiveBranch, Rebase
from prm_search.strategies.rebase import balance
from prm_search.tree import Node

TWO_WAYS = {"": ["a;", "d;"], "d;": ["a.", "b."], "a;": ["c.", "d."]}


def scores(table: dict[str, float]) -> Callable[[Node], float]:
    """A value by the letter of the last step."""
    return lambda node: table[node.text[0]]


@pytest.mark.parametrize("rule", ["puct", "uct"])
def test_mcts_goes_where_the_value_is_and_never_twice(rule: str) -> None:
    result, policy = play(TWO_WAYS, MCTS(10, 2, rule=rule, exploration=0.0, leaves=1, widening=0.0))
    assert policy.asked == [("", 2), ("d;", 2), ("a;", 2)]  # all is finished then: three simulations of ten
    assert (result.text, result.value) == ("d;b", 4.0)
    assert texts(result.candidates) == ["d;b", "d;a", "a;d", "a;c"]


def test_leaves_are_expanded_together_under_virtual_loss() -> None:
    alone, _ = play(TWO_WAYS, MCTS(10, 2, leaves=1, widening=0.0))
    together, policy = play(TWO_WAYS, MCTS(10, 2, leaves=2, widening=0.0))
    assert sorted(policy.asked) == [("", 2), ("a;", 2), ("d;", 2)]
    assert texts(together.candidates) == texts(alone.candidates)
    assert (alone.usage.forward_calls["policy"], together.usage.forward_calls["policy"]) == (3, 2)


def test_exploration_visits_what_the_value_would_leave() -> None:
    # "d;" looks best and goes on for ever; the answer is below "a;"
    script = {"": ["a;", "d;"], "a;": ["d.", "d."], "d;": ["a;", "a;"]}
    script |= {"d;" + "a;" * k: ["a;", "a;"] for k in range(1, 5)}
    for rule in ("puct", "uct"):
        _, shy = play(script, MCTS(5, 2, rule=rule, exploration=0.0, leaves=1, widening=0.0), max_new_tokens=10)
        _, curious = play(script, MCTS(5, 2, rule=rule, exploration=8.0, leaves=1, widening=0.0), max_new_tokens=10)
        assert ("a;", 2) not in shy.asked[:3]
        assert ("a;", 2) in curious.asked[:3]


def test_the_best_leaf_is_sampled_to_the_end_where_no_simulation_got_there() -> None:
    result, policy = play(TWO_WAYS, MCTS(1, 2))
    assert policy.asked == [("", 2), ("d;", 1)]
    assert texts(result.candidates) == ["d;a"]


def test_rollouts_are_drawn_once_and_their_answers_count() -> None:
    script = {"": ["a;", "d;"], "d;": ["b.", "a."], "a;": ["c.", "d."]}
    result, policy = play(script, MCTS(1, 2, rollout_steps=2))
    assert policy.asked == [("", 2), ("d;", 1)]
    assert texts(result.candidates) == ["d;b"]
    assert not any(node.rollout for node in result.candidates[0].path())
    result, policy = play(script, MCTS(4, 2, rollout_steps=1, leaves=1, widening=0.0))
    drawn = Counter[str]()
    for text, count in policy.asked:
        drawn[text] += count
    assert drawn == {"": 2, "d;": 2, "a;": 2}  # the rollout's step is one of the two children


def test_the_rule_of_rest_mcts_stops_at_its_gate_and_wants_scores() -> None:
    value = scores({"a": 0.2, "b": 0.95, "c": 0.5, "d": 0.8})
    gated, policy = play(TWO_WAYS, MCTS(10, 2, rule="rest", leaves=1), value=value)
    assert policy.asked == [("", 2), ("d;", 2)]
    assert gated.text == "d;b"
    _, policy = play(TWO_WAYS, MCTS(10, 2, rule="rest", end_gate=1.0, leaves=1, widening=0.0), value=value)
    assert policy.asked == [("", 2), ("d;", 2), ("a;", 2)]
    with pytest.raises(ValueError, match=r"rule='rest' needs values in \[0, 1\]"):
        play(TWO_WAYS, MCTS(rule="rest"))


def test_a_node_that_is_walked_through_often_draws_again_and_knows_what_is_there() -> None:
    # the answer is the third child of "a;": two draws do not show it
    script = {"": ["a;", "b;"], "a;": ["e;", "e;", "d."], "b;": ["e;", "e;"]}
    script |= {path + "e;" * k: ["e;", "e;"] if k < 4 else ["e.", "e."] for path in ("a;", "b;") for k in range(1, 5)}
    narrow, _ = play(script, MCTS(24, 2, leaves=1, widening=0.0))
    wide, policy = play(script, MCTS(24, 2, leaves=1, widening=0.5))
    assert "a;d" not in texts(narrow.candidates)
    assert "a;d" in texts(wide.candidates)
    assert policy.asked.count(("a;", 2)) > 1
    # a node may have expansions * floor(N ** widening) children: of 9 simulations through the root, 3 widen it by .5
    _, policy = play({"": ["a.", "b.", "c.", "d."]}, MCTS(9, 1, leaves=1, widening=0.5))
    assert policy.asked == [("", 1)] * 9  # all is finished below, so every simulation draws again


def test_a_thousand_simulations_are_no_quadratic_walk() -> None:
    def calls(simulations: int) -> int:
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            search(
                [[5]], policy=FakePolicy(ToyLM(letters="ab;;.")), scorer=FakeScorer(), steps=RULE, max_new_tokens=40,
                strategy=MCTS(simulations, 2),
            )  # fmt: skip
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) < 6 * calls(100)


def test_rebase_balances_as_published() -> None:
    # e = 1, e^-2, e^-4: ceil(16 / 1.1536) = 14, ceil(2 * .1353 / .1536) = 2, nothing is left
    assert balance([0.9, 0.5, 0.1], 16, 0.2) == [14, 2, 0]
    assert balance([1.0, 1.0, 1.0, 1.0], 8, 0.2) == [2, 2, 2, 2]
    assert balance([float("inf"), 0.0], 3, 1.0) == [3, 0]
    assert balance([-float("inf")], 3, 1.0) == [3]


def test_a_finished_answer_takes_one_off_the_width_of_rebase() -> None:
    script = {"": ["d.", "b;", "a;"], "b;": ["a.", "b."]}
    result, policy = play(script, Rebase(3, temperature=1.0))
    assert policy.asked == [("", 3), ("b;", 2)]  # 2 are left: ceil(2 * 1 / 1.37) = 2 for "b;", none for "a;"
    assert texts(result.candidates) == ["d", "b;b", "b;a"]


@pytest.mark.parametrize("rule", ["values", "published"])
@pytest.mark.parametrize("prior", ["gaussian", "beta"])
def test_adaptive_branching_draws_more_where_more_was_found(prior: str, rule: str) -> None:
    script = {"": ["d;", "e;"], "d;": ["d.", "c."], "e;": ["e.", "e."]}
    result, policy = play(script, AdaptiveBranch(40, prior=prior, batch=1, rule=rule))
    drawn = Counter[str]()
    for text, count in policy.asked:
        drawn[text] += count
    assert sum(drawn.values()) == 40
    assert drawn["d;"] > 3 * max(1, drawn["e;"])
    assert result.text == "d;d"


def test_adaptive_branching_by_values_follows_a_path_whose_value_falls() -> None:
    # every step costs 1, and a good one .1 only: a first step always looks better than what follows it
    script = {"d;" * k: ["d;", "e;", "d;", "e;"] for k in range(6)} | {"d;" * 6: ["d.", "e."]}
    for bad in range(6):
        for more in range(6 - bad):
            script["d;" * bad + "e;" + "e;" * more] = ["e;", "e;"]

    def fall(node: Node) -> float:
        return -sum(0.1 if step.text[0] == "d" else 1.0 for step in node.path())

    def deepest(rule: str) -> int:
        strategy = AdaptiveBranch(60, until="step", rule=rule)
        _, policy = play(script, strategy, value=fall, max_new_tokens=14, seed=2)
        return max(text.count(";") for text, _ in policy.asked[:-1])

    assert deepest("values") == 6
    assert deepest("published") <= 4


def test_the_trend_of_values_changes_no_choice() -> None:
    script = {"": ["d;", "e;", "d;", "c;"]} | {f"{a};": ["d.", "c.", "e."] for a in "cde"}

    def asked(drop: float) -> list[tuple[str, int]]:
        base = scores({"c": 3.0, "d": 4.0, "e": 1.0})
        strategy = AdaptiveBranch(30, until="step", batch=1)
        _, policy = play(script, strategy, value=lambda node: base(node) - drop * node.depth)
        return policy.asked

    assert asked(0.0) == asked(64.0)  # a power of two: the sums are exact


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MCTS(0), "simulations=0"), (lambda: MCTS(expansions=0), "expansions=0"),
        (lambda: MCTS(leaves=1.5), "leaves=1.5"),
        (lambda: MCTS(rollout_steps=-1), "rollout_steps=-1"), (lambda: MCTS(rule="max"), "rule='max'"),
        (lambda: MCTS(backup="sum"), "backup='sum'"), (lambda: MCTS(exploration=-1), "exploration=-1"),
        (lambda: MCTS(alpha=2), "alpha=2"), (lambda: MCTS(end_gate=float("nan")), "end_gate=nan"),
        (lambda: MCTS(value="best"), "value='best'"), (lambda: Rebase(0), "width=0"),
        (lambda: Rebase(temperature=0), "temperature=0"), (lambda: Rebase(value="best"), "value='best'"),
        (lambda: AdaptiveBranch(0), "draws=0"), (lambda: AdaptiveBranch(batch=True), "batch=True"),
        (lambda: AdaptiveBranch(prior="normal"), "prior='normal'"),
        (lambda: AdaptiveBranch(until="here"), "until='here'"), (lambda: AdaptiveBranch(rule="new"), "rule='new'"),
    ],
)  # fmt: skip
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
