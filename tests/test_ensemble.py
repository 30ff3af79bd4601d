"""Ensemble: numbers worked out by hand, members of every kind in a search, and what is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import RULE, FakeAsyncPolicy, FakePolicy, FakeScorer, step_scores
from pairs import byte_tokenizer, llama
from prm_models import publish

import prm_search as ps
from prm_search.protocols import ScorerDefaults
from prm_search.tree import Node, Prompt, SearchTree


class Table(ScorerDefaults):
    """Rewards by the text of a step."""

    def __init__(
        self,
        name: str,
        table: dict[str, float],
        reward_range: tuple[float, float] | None = (0.0, 1.0),
        whole: bool = False,
        default_value: str | None = "min",
    ) -> None:
        self.name, self.table, self.whole = name, table, whole
        self.reward_range, self.default_value = reward_range, default_value

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        for node in (part for end in nodes for part in end.path()):
            if not node.scored_by(self.name):
                reward = 0.0 if self.whole and not node.finished else self.table[node.text]
                node.set_rewards(self.name, np.full(len(node.token_ids), 0.0), reward)


def siblings(logprobs: Sequence[float] | None = None) -> list[Node]:
    tree = SearchTree(Prompt(text="q"))
    nodes = []
    for place, text in enumerate("abc"):
        own = None if logprobs is None else np.array([logprobs[place] / 2] * 2, np.float32)
        nodes.append(tree.add(tree.root, [1, 2], text=text, logprobs=own))
    return nodes


ONE = {"a": 0.9, "b": 0.5, "c": 0.2}
TWO = {"a": 0.0, "b": 1.0, "c": -1.0}  # in [-1, 1]: .5, 1, 0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"reduce": "mean"}, [0.7, 0.75, 0.1]),
        ({"reduce": "mean", "weights": [3, 1]}, [0.8, 0.625, 0.15]),
        ({"reduce": "mean", "weights": {"one": 3}}, [0.8, 0.625, 0.15]),
        ({"reduce": "min"}, [0.5, 0.5, 0.0]),
        ({"reduce": "lcb"}, [0.5, 0.5, 0.0]),  # of two equal weights: sigma is half the difference
        ({"reduce": "lcb", "k": 2}, [0.3, 0.25, -0.1]),
        ({"reduce": "lcb", "k": 0}, [0.7, 0.75, 0.1]),
    ],
)
def test_rewards_are_the_formulas(given: dict[str, Any], wanted: list[float]) -> None:
    ensemble = ps.Ensemble([Table("one", ONE), Table("two", TWO, (-1.0, 1.0))], **given)
    nodes = siblings()
    ensemble.score_nodes(nodes)
    assert [node.reward_of("ensemble") for node in nodes] == pytest.approx(wanted)
    assert [node.reward_of("one") for node in nodes] == pytest.approx(list(ONE.values()))
    assert [node.reward_of("two") for node in nodes] == pytest.approx(list(TWO.values()))
    assert ensemble.scaled(nodes[0]) == pytest.approx({"one": 0.9, "two": 0.5})
    if "weights" not in given:
        assert [ensemble.spread(node) for node in nodes] == pytest.approx([0.2, 0.25, 0.1])
        assert [node.reward_of("ensemble.spread") for node in nodes] == pytest.approx([0.2, 0.25, 0.1])
    copy = SearchTree.from_json(nodes[0].tree.to_json())
    assert copy.nodes[1].reward_of("ensemble.spread") == ensemble.spread(nodes[0])


def test_policy_subtracts_what_the_policy_would_expect() -> None:
    ensemble = ps.Ensemble([Table("one", ONE), Table("two", TWO, (-1.0, 1.0))], "policy")
    nodes = siblings([math.log(0.1), math.log(0.2), math.log(0.2)])  # shares .2, .4, .4
    ensemble.score_nodes(nodes)
    expected = 0.2 * 0.7 + 0.4 * 0.75 + 0.4 * 0.1
    assert [node.reward_of("ensemble") for node in nodes] == pytest.approx([m - expected for m in (0.7, 0.75, 0.1)])
    weighted = math.fsum(p * node.reward_of("ensemble") for p, node in zip((0.2, 0.4, 0.4), nodes, strict=True))
    assert weighted == pytest.approx(0, abs=1e-6)  # log-probabilities are kept in fp32
    counted = siblings()  # no log-probabilities: as often as each was drawn
    counted[2].lineages = (0, 1)
    ensemble.score_nodes(counted)
    assert counted[0].reward_of("ensemble") == pytest.approx(0.7 - (0.7 + 0.75 + 2 * 0.1) / 4)
    with pytest.raises(ValueError, match="reduce='policy' weighs the siblings of a search"):
        ensemble.score(["a"], ["b"])


def test_members_without_bounds_go_through_a_sigmoid_and_scales_may_be_given() -> None:
    pair = Table("pair", {"a": 2.0, "b": 0.0, "c": -800.0}, None)
    nodes = siblings()
    ps.Ensemble([pair]).score_nodes(nodes)
    assert [node.reward_of("ensemble") for node in nodes] == pytest.approx([1 / (1 + math.exp(-2)), 0.5, 0.0])
    nodes = siblings()
    scales: dict[str, Callable[[float], float] | tuple[float, float]] = {"pair": (-4.0, 4.0), "one": lambda x: x / 2}
    ps.Ensemble([Table("pair", {"a": 2.0, "b": 0.0, "c": -4.0}, None), Table("one", ONE)], scales=scales).score_nodes(
        nodes
    )
    assert [node.reward_of("ensemble") for node in nodes] == pytest.approx([0.6, 0.375, 0.05])


def test_answer_models_have_no_say_on_steps() -> None:
    tree = SearchTree(Prompt(text="q"))
    step = tree.add(tree.root, [1], text="a")
    end = tree.add(step, [2], text="b", finish="stop")
    whole = Table("rm", {"b": 0.1}, whole=True, default_value=None)
    ensemble = ps.Ensemble([Table("one", ONE), whole])
    ensemble.score_nodes([end])
    assert (step.reward_of("ensemble"), end.reward_of("ensemble")) == pytest.approx((0.9, 0.3))
    assert (ensemble.spread(step), ensemble.default_value, ensemble.whole) == (0.0, "min", False)
    alone = ps.Ensemble([whole], name="alone")
    alone.score_nodes([end])
    assert (step.reward_of("alone"), end.q_of("alone"), alone.default_value) == (0.0, pytest.approx(0.1), None)
    assert alone.whole


def test_the_default_value_is_the_members_where_they_agree() -> None:
    def value(*values: str | None) -> object:
        return ps.Ensemble([Table(str(i), ONE, default_value=v) for i, v in enumerate(values)]).default_value

    assert [value("mean", "mean"), value("mean", "prod"), value(None), value("q")] == ["mean", "min", "min", "min"]
    assert ps.Ensemble([Table("one", ONE)], "policy").default_value is None


def test_every_member_guides_a_search_and_is_released() -> None:
    first, second = FakeScorer(name="first"), FakeScorer(step_scores({"a": 0.5, "b": -0.5}), name="second")
    ensemble = ps.Ensemble([first, second])
    (result,) = ps.search(["q"], policy=FakePolicy(), scorer=ensemble, strategy=ps.Beam(2, 2), steps=RULE)
    assert not first.trees and not second.trees  # noqa: PT018
    path = result.node.path()
    sigmoid = [sum(1 / (1 + math.exp(-n.reward_of(m))) for m in ("first", "second")) / 2 for n in path]
    assert [node.reward for node in path] == pytest.approx(sigmoid)
    assert result.value == pytest.approx(min(sigmoid))
    assert set(result.usage.encoded_tokens) == {f"{m}.{r}" for m in ("first", "second") for r in ("prm", "reference")}

    async def run() -> list[ps.Result]:
        return await ps.asearch(["q"], policy=FakeAsyncPolicy(), scorer=ensemble, strategy=ps.Beam(2, 2), steps=RULE)

    (other,) = asyncio.run(run())
    assert other.value == pytest.approx(result.value)
    failing = FakeScorer(name="second", fail_at=1)
    with pytest.raises(RuntimeError, match="the scorer failed"):
        ps.search(["q"], policy=FakePolicy(), scorer=ps.Ensemble([first, failing]), steps=RULE)
    assert not first.trees


def test_a_pair_a_step_prm_and_a_judge_together(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    policy = ps.HFPolicy(llama(3), tokenizer)
    pair = ps.ImplicitPRM(llama(4), policy, tokenizer=tokenizer, name="pair")
    prm = ps.StepPRM.from_pretrained(publish(tmp_path / "prm", "qwen_math"))
    judge = ps.Judge(policy, format=ps.JudgeFormat("{question}\n{steps}\nGood?", {"y": 1, "n": 0}))
    ensemble = ps.Ensemble([pair, prm, judge], "lcb")
    (result,) = ps.search(
        ["What is two and three?"], policy=policy, scorer=ensemble, strategy=ps.Beam(2, 2), max_new_tokens=12,
        steps=ps.StepRule(";", max_tokens=6),
    )  # fmt: skip
    for node in result.node.path():
        scaled = [1 / (1 + math.exp(-node.reward_of("pair"))), node.reward_of("prm"), node.reward_of("judge")]
        assert node.reward == pytest.approx(np.mean(scaled) - np.std(scaled), abs=1e-9)
    assert policy.lm.tree.used == prm.prm.tree.used == pair.prm.tree.used == 0
    (scores,) = ps.Ensemble([pair, prm, judge], "min").score(["What is two and three?"], [["Add.", "It is five."]])
    (alone,) = prm.score(["What is two and three?"], [["Add.", "It is five."]])
    assert (scores.step_scores <= alone.step_scores + 1e-6).all()
    assert scores.reward == pytest.approx(scores.step_scores.min())


@pytest.mark.parametrize(
    ("scorers", "given", "error", "message"),
    [
        ([], {}, ValueError, "scorers is empty"),
        (["prm"], {}, TypeError, r"scorers\[0\] must be a Scorer"),
        ([Table("one", ONE), Table("one", TWO)], {}, ValueError, "two are named 'one'"),
        ([Table("ensemble", ONE)], {}, ValueError, "two are named 'ensemble'"),
        ([Table("one", ONE)], {"reduce": "median"}, ValueError, "reduce='median': it is one of mean, min, lcb, policy"),
        ([Table("one", ONE)], {"k": -1}, ValueError, "k=-1"),
        ([Table("one", ONE)], {"weights": [1, 2]}, ValueError, "weights has 2 numbers for 1 scorers"),
        ([Table("one", ONE)], {"weights": {"two": 1}}, ValueError, "weights: no member is named 'two'; they are one"),
        ([Table("one", ONE)], {"weights": [0]}, ValueError, r"weights\['one'\]=0"),
        ([Table("one", ONE)], {"weights": [1], "reduce": "min"}, ValueError, "weights: reduce='min'"),
        ([Table("one", ONE)], {"scales": {"one": (1, 0)}}, ValueError, "low < high"),
        (
            [Table("one", ONE)],
            {"scales": {"one": "sigmoid"}},
            TypeError,
            r"\(low, high\), a function, or a calibration's file",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    scorers: list[Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ps.Ensemble(scorers, **given)
