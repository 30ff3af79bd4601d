"""Values against their formulas on trees with known rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from prm_search import values
from prm_search.tree import Node, SearchTree
from prm_search.values import VALUES, Advantage, along, resolve_value, step_ends, step_q, step_rewards

REWARDS = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=4), min_size=1, max_size=6)


OF_REWARDS = {name: value for name, value in values.VALUES.items() if name != "prod"}  # that one takes scores >= 0


def chain(rewards: list[list[float]], **pairs: list[list[float]]) -> Node:
    """The last node of a path whose tokens have these rewards, under the primary pair and others."""
    tree = SearchTree("p")
    node = tree.root
    for i, step in enumerate(rewards):
        node = tree.add(node, range(len(step)))
        for name, steps in {"prm": rewards, **pairs}.items():
            node.set_rewards(name, np.array(steps[i], np.float32))
    return node


@given(rewards=REWARDS)
def test_every_value_is_its_formula(rewards):
    node = chain(rewards)
    steps = [math.fsum(step) for step in rewards]
    qs = [math.fsum(steps[: i + 1]) for i in range(len(steps))]
    tokens = sum(map(len, rewards))
    want = {
        "q": qs[-1],
        "last": steps[-1],
        "min": min(steps),
        "mean": qs[-1] / len(steps),
        "prefix_mean": qs[-1] / tokens,
        "min_q": min(qs),
    }
    assert set(want) == set(OF_REWARDS)
    for name, number in want.items():
        assert resolve_value(name)(node) == pytest.approx(number, abs=1e-9), name


def test_a_worked_example():
    node = chain([[1.0, 1.0], [-3.0], [0.5, 0.5, 0.5]])
    assert {name: value(node) for name, value in OF_REWARDS.items()} == pytest.approx(
        {"q": 0.5, "last": 1.5, "min": -3.0, "mean": 0.5 / 3, "prefix_mean": 0.5 / 6, "min_q": -1.0}
    )


def test_the_root_has_value_zero():
    root = SearchTree("p").root
    assert all(value(root) == 0.0 for value in values.VALUES.values())
    assert Advantage(2.0, None)(root) == 0.0


@given(rewards=REWARDS, scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_another_beta_rescales_every_value(rewards, scale):
    node, scaled = chain(rewards), chain([[r * scale for r in step] for step in rewards])
    for value in OF_REWARDS.values():
        assert value(scaled) == pytest.approx(scale * value(node), abs=1e-9)


def test_a_branch_sees_its_own_path_only():
    tree = SearchTree("p")
    first = tree.add(tree.root, [1])
    left, right = tree.add(first, [2]), tree.add(first, [3, 4])
    for node, rewards in ((first, [1.0]), (left, [-4.0]), (right, [2.0, 1.0])):
        node.set_rewards("prm", np.array(rewards))
    assert values.minimum(left) == -4.0
    assert values.minimum(right) == 1.0
    assert values.prefix_mean(right) == pytest.approx(4 / 3)


class TestAdvantage:
    def test_adds_the_progress_that_the_step_made_under_the_prover(self):
        node = chain([[1.0], [2.0]], prover=[[0.25], [-0.5]])
        assert Advantage(alpha=2.0)(node) == pytest.approx(3.0 - 1.0)
        assert node.parent is not None
        assert Advantage(alpha=2.0)(node.parent) == pytest.approx(1.0 + 0.5)

    def test_over_another_value_and_another_name(self):
        node = chain([[1.0], [2.0]], strong=[[0.25], [-0.5]])
        assert Advantage(2.0, "strong", values.last)(node) == pytest.approx(2.0 - 1.0)
        assert Advantage(2.0, "strong", "min")(node) == pytest.approx(1.0 - 1.0)
        assert Advantage(2.0, None)(node) == pytest.approx(3.0 + 2 * 2.0)  # the primary pair's own

    def test_a_prover_that_has_not_scored_is_named(self):
        with pytest.raises(ValueError, match=r"prover='prover'.*'prm'"):
            Advantage()(chain([[1.0]]))

    @pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
    def test_alpha_is_finite(self, alpha):
        with pytest.raises(ValueError, match="alpha"):
            Advantage(alpha)


class TestResolve:
    def test_a_callable_is_itself(self):
        def depth(node: Node) -> float:
            return float(node.depth)

        assert resolve_value(depth) is depth

    def test_an_unknown_name_is_told_what_there_is(self):
        with pytest.raises(ValueError, match=r"'best'.*'last'.*'min_q'.*'prefix_mean'"):
            resolve_value("best")

    def test_other_types(self):
        with pytest.raises(TypeError, match="int"):
            resolve_value(3)  # type: ignore[arg-type]


class TestStatistics:
    def test_along_a_path(self):
        node = chain([[1.0, 1.0], [-3.0]], prover=[[0.0, 0.5], [0.25]])
        np.testing.assert_array_equal(step_rewards(node), [2.0, -3.0])
        np.testing.assert_array_equal(step_q(node), [2.0, -1.0])
        np.testing.assert_array_equal(step_rewards(node, "prover"), [0.5, 0.25])
        np.testing.assert_array_equal(step_q(node, "prover"), [0.5, 0.75])
        np.testing.assert_array_equal(step_ends(node), [2, 3])

    def test_of_the_root_are_empty(self):
        root = SearchTree("p").root
        assert step_rewards(root).shape == step_q(root).shape == step_ends(root).shape == (0,)

    def test_of_a_pair_that_has_not_scored(self):
        with pytest.raises(KeyError, match="prover"):
            step_rewards(chain([[1.0]]), "prover")


@given(scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_a_product_of_step_scores(scores):
    node = chain([[0.0, score] for score in scores])
    assert resolve_value("prod")(node) == pytest.approx(math.prod(scores), rel=1e-6, abs=1e-300)


def test_a_product_wants_scores():
    with pytest.raises(ValueError, match=r"value='prod' needs step scores >= 0, .* got -0\.5"):
        resolve_value("prod")(chain([[0.5], [-0.5]]))


@given(
    rewards=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 4), min_size=6, max_size=6),
)
def test_values_along_rewards_are_those_of_the_nodes(rewards, lengths):
    """Every value, at the end of every step, without a tree."""
    tree = SearchTree("p")
    node, nodes = tree.root, []
    for reward, length in zip(rewards, lengths, strict=False):
        node = tree.add(node, [1] * length)
        node.set_rewards("prm", np.zeros(length, np.float32), reward)
        nodes.append(node)
    ends = [node.end for node in nodes]
    for name, value in VALUES.items():
        if name == "prod" and min(rewards) < 0:
            with pytest.raises(ValueError, match="prod"):
                along(name, rewards, ends)
        else:
            assert along(name, rewards, ends).tolist() == [value(node) for node in nodes]


def test_along_names_what_is_wrong():
    with pytest.raises(ValueError, match="value='best' is unknown"):
        along("best", [1.0], [1])
    with pytest.raises(ValueError, match="2 steps and step_ends 1"):
        along("q", [1.0, 2.0], [1])
