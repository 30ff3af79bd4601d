"""Scorers: what all of them share, a scorer that is not a pair, plain ones, the value a scorer is meant for."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from fakes import FakePolicy, FakeScorer
from pairs import byte_tokenizer, llama

from prm_search import BestOfN, ImplicitPRM, StepRule, search
from prm_search.protocols import ScorerDefaults
from prm_search.scorers.base import ScorerBase
from prm_search.tree import Node, SearchTree
from prm_search.values import minimum

RULE = StepRule(delimiter="\n\n")
SEMICOLON = StepRule(delimiter=";", max_tokens=6)


class LongSteps(ScorerBase):
    """A step's score is a number of its tokens and its place: no model."""

    default_value = "min"

    def __init__(self, tokenizer=None):
        super().__init__("long", tokenizer)
        self.batches: list[int] = []
        self.released: list[SearchTree] = []

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        todo = self.unscored(nodes)
        self.batches.append(len(todo))
        for node in todo:
            self.set_step_reward(node, 1 / (len(node.token_ids) + node.depth))

    def release(self, tree: SearchTree) -> None:
        self.released.append(tree)


def test_a_scorer_that_is_no_pair_scores_responses_step_by_step():
    scorer = LongSteps(byte_tokenizer())
    texts = ["one\n\ntwo and\n\nthree", "four"]
    first, second = scorer.score(["q", "q"], texts, steps=RULE)
    tokens = np.diff(first.step_ends, prepend=0)
    assert len(tokens) == 3
    assert first.step_ends[-1] == len(first.token_ids)
    np.testing.assert_allclose(first.step_rewards, 1 / (tokens + np.arange(1, 4)), atol=1e-7)
    assert np.flatnonzero(first.token_rewards).tolist() == (first.step_ends - 1).tolist()
    assert second.step_rewards == pytest.approx([1 / (len(second.token_ids) + 1)])
    assert first.text == texts[0] + "<|im_end|>"
    assert scorer.batches == [4]
    assert len(scorer.released) == 1


def test_batches_change_no_scores_and_every_tree_is_released_once():
    scorer = LongSteps(byte_tokenizer())
    prompts, texts = ["q", "r", "q", "r"], ["a\n\nb", "c", "d\n\ne\n\nf", "g"]
    whole = scorer.score(prompts, texts, steps=RULE)
    trees = len(scorer.released)
    parts = scorer.score(prompts, texts, steps=RULE, batch_tokens=1)
    assert len(scorer.batches) == 1 + len(texts)
    assert trees == 2
    assert len(set(scorer.released)) == 4
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.token_rewards, other.token_rewards)


def test_what_responses_are_checked_for_holds_for_every_scorer():
    scorer = LongSteps()
    with pytest.raises(ValueError, match=r"this scorer has no tokenizer: pass LongSteps\(..., tokenizer=...\)"):
        scorer.score(["q"], ["a"])
    with pytest.raises(ValueError, match="prompts has 2 entries and responses 1"):
        LongSteps(byte_tokenizer()).score(["q", "r"], ["a"])
    with pytest.raises(ValueError, match="name='': a non-empty string is needed"):
        ScorerBase.__init__(scorer, "")


def test_a_scorer_names_the_value_it_is_meant_for():
    def values(**given):
        results = search(
            list("abcd"), policy=FakePolicy(), scorer=LongSteps(), strategy=BestOfN(4), steps=SEMICOLON, **given
        )
        return [node for result in results for node in result.tree.nodes[1:] if node.value is not None]

    assert all(node.value == minimum(node) for node in values())
    assert any(node.value != node.q for node in values())
    assert all(node.value == node.q for node in values(value="q"))


def test_a_pair_says_that_it_cannot_be_pickled():
    pair = ImplicitPRM(llama(1), llama(2), tokenizer=byte_tokenizer())
    with pytest.raises(TypeError, match="a ImplicitPRM holds models: it cannot be pickled"):
        pickle.dumps(pair)


def test_a_plain_scorer_is_completed_and_what_it_has_is_used():
    plain = FakeScorer()
    full = ScorerDefaults.of(plain)
    assert (full.name, full.models) == (plain.name, plain.models)
    assert full.policy_context is None
    assert full.forward_calls is None
    assert full.default_value is None
    full.bind(None)
    assert ScorerDefaults.of(full) is full

    class Richer(FakeScorer):
        policy_context, forward_calls, default_value = 40, 7, "last"

        def bind(self, policy):
            self.policy = policy

    rich = Richer()
    full = ScorerDefaults.of(rich)
    full.bind("it")
    assert (full.policy_context, full.forward_calls, full.default_value, rich.policy) == (40, 7, "last", "it")
