"""PRMGuidance: what it checks and what it makes of its fields."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature

import pytest
from fakes import FakeScorer

import prm_search as ps
from prm_search.driver.search_settings import SearchSettings


@pytest.fixture
def pair():
    return FakeScorer()


def test_defaults_are_searchs(pair):
    guidance = ps.PRMGuidance(pair)
    defaults = signature(ps.search).parameters
    for field in fields(guidance):
        if field.name in defaults and field.name not in ("prompts", "seed"):
            assert getattr(guidance, field.name) == defaults[field.name].default, field.name
    assert guidance.seed is None  # the caller's; for generate, torch's generator


def test_shares_searchs_fields(pair):
    mine = {field.name for field in fields(ps.PRMGuidance)}
    assert {"strategy", "steps", "select", "answer", "prover", "budget", "value", "seed"} <= mine
    assert mine - set(signature(ps.search).parameters) == {"pair"}  # search calls it scorer


def test_frozen_and_keyword_only(pair):
    guidance = ps.PRMGuidance(pair, strategy=ps.Beam(2, 2))
    with pytest.raises(FrozenInstanceError):
        guidance.seed = 3
    with pytest.raises(TypeError):
        ps.PRMGuidance(pair, ps.Beam(2, 2))
    assert replace(guidance, seed=3).strategy == ps.Beam(2, 2)


def test_settings(pair):
    rule = ps.StepRule(delimiter="\n")
    guidance = ps.PRMGuidance(
        pair, strategy=ps.DVTS(2), steps=rule, select="weighted", answer="boxed", budget=99, value="min", seed=5,
        weight="sigmoid", weight_temperature=0.5,
    )  # fmt: skip
    mine = guidance.settings(max_new_tokens=7, seed=1, temperature=0.3, top_p=0.9, top_k=4, min_p=0.1)
    assert mine == SearchSettings.make(
        strategy=ps.DVTS(2), steps=rule, max_new_tokens=7, temperature=0.3, top_p=0.9, top_k=4, min_p=0.1, seed=5,
        select="weighted", answer="boxed", budget=99, value="min", weight="sigmoid", weight_temperature=0.5,
    )  # fmt: skip


def test_the_callers_seed_is_for_guidance_without_one(pair):
    assert ps.PRMGuidance(pair).settings(max_new_tokens=7, seed=1).sampling.seed == 1
    assert ps.PRMGuidance(pair, seed=0).settings(max_new_tokens=7, seed=1).sampling.seed == 0


@pytest.mark.parametrize(
    ("own", "given", "seconds"), [(None, 2.0, 2.0), (1.0, 2.0, 1.0), (3.0, 2.0, 2.0), (3.0, None, 3.0)]
)
def test_the_shorter_time_counts(pair, own, given, seconds):
    guidance = ps.PRMGuidance(pair, budget=ps.Budget(tokens=50, seconds=own))
    assert guidance.settings(max_new_tokens=7, seed=1, seconds=given).budget == ps.Budget(tokens=50, seconds=seconds)


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"strategy": "bean"}, ValueError, "strategy='bean'"),
        ({"strategy": ps.Beam}, TypeError, "strategy"),
        ({"strategy": 4}, TypeError, "strategy"),
        ({"steps": "\n"}, TypeError, "steps"),
        ({"select": "first"}, ValueError, "select='first'"),
        ({"answer": "box"}, ValueError, "answer='box'"),
        ({"answer": 5}, TypeError, "answer"),
        ({"budget": 0}, ValueError, "tokens=0"),
        ({"budget": "much"}, TypeError, "budget"),
        ({"value": "median"}, ValueError, "value"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": True}, TypeError, "seed"),
        ({"weight": "linear"}, ValueError, "weight='linear'"),
        ({"weight_temperature": 0.0}, ValueError, "weight_temperature=0.0"),
        ({"prover": "qwen"}, TypeError, "prover"),
        ({"prover": FakeScorer()}, ValueError, "prover and pair are both named"),
        ({"prompts": "text"}, TypeError, "prompts"),
        ({"prompts": [""]}, ValueError, r"prompts\[0\].*empty"),
        ({"prompts": ["fine", [1, 2]]}, ValueError, r"prompts\[1\].*token ids"),
        ({"prompts": ["fine", 7]}, TypeError, r"prompts\[1\]"),
    ],
)
def test_refused_by_name(pair, given, error, named):
    with pytest.raises(error, match=named):
        ps.PRMGuidance(pair, **given)


def test_a_pair_is_needed():
    with pytest.raises(TypeError):
        ps.PRMGuidance()
    for wrong in (None, "Qwen/Qwen2.5-0.5B", 5):
        with pytest.raises(TypeError, match="pair must be a Scorer"):
            ps.PRMGuidance(wrong)


def test_prompts(pair):
    chat = [{"role": "user", "content": "2+2?"}]
    guidance = ps.PRMGuidance(pair, prompts=["text", chat])
    assert [prompt.text for prompt in guidance.prompts] == ["text", None]
    assert guidance.prompts[1].messages == tuple(chat)
