"""A server's own guidance: for requests that bring none, and for those that ask for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prm_search.demo.chains import answer
from prm_search.driver.guidance_file import guidance_of
from prm_search.serving.config import ServeConfig
from prm_search.serving.errors import RequestError
from prm_search.serving.limits import Limits
from prm_search.serving.request import SearchRequest, make_ask
from prm_search.serving.schema import parse
from prm_search.steps import StepRule
from prm_search.strategies import Beam, BestOfN, ByDifficulty

LIMITS = Limits(max_tokens=100, sampled_tokens=400, children=20, seconds=9.0)
CONTENT = {
    "policy": "demo", "pair": "demo", "value": "min", "select": "weighted", "weight_temperature": 0.5,
    "strategy": {"name": "by_difficulty", "probe": 2, "thresholds": [0.0],
                 "strategies": [{"name": "beam", "width": 2}, {"name": "best_of_n", "n": 4}]},
    "steps": {"delimiter": ";"}, "budget": {"tokens": 512, "seconds": 60}, "temperature": 0.7, "max_new_tokens": 64,
}  # fmt: skip
SERVER_RULE = StepRule("\n")


def ask(guidance: dict[str, Any] | None = None, **body: Any) -> SearchRequest:
    tuned = guidance_of(CONTENT if guidance is None else guidance, "guidance")
    return make_ask(parse("text", json.dumps({"prompt": "?", **body}).encode()), LIMITS, steps=SERVER_RULE, tuned=tuned)


def test_a_request_without_guidance_is_searched_as_the_file_says() -> None:
    made = ask(seed=7, stop="!")
    settings = made.settings
    assert made.guided
    assert settings.strategy == ByDifficulty(2, (0.0,), (Beam(2), BestOfN(4)))
    assert (settings.value, settings.select, settings.weight_temperature) == ("min", "weighted", 0.5)
    sampling = settings.sampling
    assert (sampling.steps, sampling.temperature, sampling.max_new_tokens) == (StepRule(";"), 0.7, 64)
    assert (sampling.seed, sampling.stop) == (7, ("!",))
    assert (settings.budget.tokens, settings.budget.seconds) == (400, 9.0)  # the server's limits are smaller


def test_what_a_request_says_itself_goes_before_the_file() -> None:
    made = ask(temperature=0.3, max_tokens=20, top_p=0.5)
    assert (made.settings.sampling.temperature, made.settings.sampling.max_new_tokens) == (0.3, 20)
    own = ask(prm_guidance={"strategy": "beam", "width": 2, "expansions": 2})
    assert (own.settings.strategy, own.settings.select) == (Beam(2, 2), "best")
    plain = ask(prm_guidance=None)  # null: no search
    assert not plain.guided
    assert plain.settings.strategy == BestOfN(1)


def test_the_strategy_tuned_asks_for_it_by_name() -> None:
    made = ask(prm_guidance={"strategy": "tuned", "return_candidates": True})
    assert made.candidates
    assert made.settings == ask(prm_guidance={"strategy": "tuned"}, seed=made.settings.sampling.seed).settings
    body = parse("text", json.dumps({"prompt": "?", "prm_guidance": {"strategy": "tuned"}}).encode())
    with pytest.raises(RequestError, match="'tuned' is unknown"):
        make_ask(body, LIMITS, steps=SERVER_RULE)


def test_the_file_may_name_a_function_for_answers_and_a_request_may_not() -> None:
    assert ask(CONTENT | {"answer": "prm_search.demo.chains:answer"}).settings.answer is answer
    with pytest.raises(RequestError, match="os:getcwd") as caught:
        ask(prm_guidance={"strategy": "beam", "answer": "os:getcwd"})
    assert caught.value.param == "prm_guidance.answer"


def test_steer_is_served_as_a_steered_policy() -> None:
    made = ask({"strategy": {"name": "steer", "alpha": 0.5, "n": 2}})
    assert (made.settings.strategy, made.alpha) == (BestOfN(2), 0.5)
    assert made.settings.sampling.steps == SERVER_RULE  # the file has none


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prm_guidance": {"strategy": "tuned", "width": 2}}, "prm_guidance.width"),
        ({"max_tokens": 200}, "max_tokens"), ({"temperature": 0}, "temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**body)
    assert caught.value.param == param
    with pytest.raises(RequestError, match="children at once"):
        ask({"strategy": {"name": "beam", "width": 20}})


def test_the_configuration_carries_it_to_another_process() -> None:
    config = ServeConfig(pair="demo", guidance=CONTENT)
    again = ServeConfig.of(json.loads(config.json()))
    assert again.tuned() == guidance_of(CONTENT, "guidance")
    with pytest.raises(ValueError, match="guidance: width is unknown"):
        ServeConfig(pair="demo", guidance={"strategy": "beam", "width": 2})
