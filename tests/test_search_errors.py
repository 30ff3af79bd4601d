"""search when something fails, and bad input: what is said, and that nothing is left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fakes import RULE, FakePolicy, FakeScorer, ids
from search_cases import look

from prm_search.driver.search_settings import SearchSettings
from prm_search.search import SearchLoop, search
from prm_search.strategies import DVTS, Beam, BestOfN, Lookahead, Steer, Strategy
from prm_search.tree import Prompt, SearchTree

# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [BestOfN(3), Beam(2, 2), DVTS(2, 1, 2), Lookahead(2, 2)])
@pytest.mark.parametrize("what", ["policy", "scorer", "value", "answer", "on_event", "interrupt"])
def test_errors_propagate_and_leave_nothing(strategy: Strategy, what: str) -> None:
    policy, scorer, prover = FakePolicy(), FakeScorer(), FakeScorer(name="second")
    calls = iter(range(100))

    def fail(*_: object) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt if what == "interrupt" else RuntimeError(f"the {what} failed")
        return 0.0 if what == "value" else None

    options: dict[str, Any] = {"prover": prover, "strategy": strategy, "select": "majority"}
    if what == "policy":
        policy.fail_at = 3
    elif what == "scorer":
        prover.fail_at = 2
    else:
        options["on_event" if what == "interrupt" else what] = fail
    with pytest.raises(KeyboardInterrupt if what == "interrupt" else RuntimeError, match=r"failed|^$"):
        look([[1], [2], [3]], policy, scorer, **options)
    assert not policy.trees | scorer.trees | prover.trees
    assert not policy.requests


def test_an_error_in_a_step_leaves_nothing_outside_with_either() -> None:
    policy, scorer = FakePolicy(fail_at=3), FakeScorer()
    loop = SearchLoop(policy, scorer)
    for i in (1, 2):
        loop.add(Prompt(token_ids=(i,)), SearchSettings.make(strategy=Beam(2, 2), steps=RULE))
    assert loop.step() == loop.step() == []
    with pytest.raises(RuntimeError, match="the policy failed"):
        loop.step()
    assert not loop.active
    assert not policy.trees | scorer.trees


def test_the_first_error_is_the_one_to_report() -> None:
    class Clumsy(FakeScorer):
        def release(self, tree: SearchTree) -> None:
            raise OSError("cannot release")

    policy = FakePolicy(fail_at=2)
    with pytest.raises(RuntimeError, match="the policy failed"):
        look([[1], [2]], policy, Clumsy())
    assert not policy.trees
    policy = FakePolicy()
    with pytest.raises(OSError, match="cannot release"):
        look([[1]], policy, Clumsy())
    assert not policy.trees


def test_a_bad_prompt_disturbs_no_other_search() -> None:
    policy = FakePolicy(context=8)
    settings = SearchSettings.make(strategy=Beam(2, 2), steps=RULE, max_new_tokens=5)
    with SearchLoop(policy, FakeScorer()) as loop:
        loop.add(Prompt(token_ids=(1,)), settings)
        loop.step()
        with pytest.raises(ValueError, match="no room"):
            loop.add(Prompt(token_ids=(1,) * 9), settings)
        while not (results := loop.step()):
            pass
    assert results[0].stopped in ("finished", "length")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "beams"}, ValueError, "strategy='beams' is unknown"),
        ({"strategy": Beam}, TypeError, "strategy must be"),
        ({"temperature": math.nan}, ValueError, "temperature=nan"),
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"top_p": 0}, ValueError, "top_p=0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"select": "worst"}, ValueError, "select='worst'"),
        ({"answer": "roman"}, ValueError, "answer='roman'"),
        ({"answer": 4}, TypeError, "answer must be"),
        ({"budget": 0}, ValueError, "tokens=0"),
        ({"budget": "much"}, TypeError, "budget must be"),
        ({"value": "best"}, ValueError, "value='best'"),
        ({"weight": "linear"}, ValueError, "weight='linear'"),
        ({"weight_temperature": 0.0}, ValueError, "weight_temperature=0.0"),
        ({"steps": "\n"}, TypeError, "steps must be a StepRule"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"policy": object()}, TypeError, "policy must be a Policy, but object has no advance, encode"),
        ({"scorer": object()}, TypeError, "scorer must be a Scorer, but object has no models, name"),
        ({"prover": object()}, TypeError, "prover must be a Scorer"),
        ({"prover": FakeScorer()}, ValueError, "both named 'prm'"),
        ({"scorer": None, "prover": FakeScorer()}, ValueError, "prover= needs scorer="),
        ({"scorer": None, "value": "min"}, ValueError, "value='min' needs scorer="),
        ({"scorer": None, "strategy": Beam(value="min")}, ValueError, "value='min' needs scorer="),
        ({"scorer": None, "strategy": Steer(1.0)}, ValueError, "needs scorer="),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type, message: str) -> None:
    policy = FakePolicy()
    with pytest.raises(error, match=message):
        search([[1]], **{"policy": policy, "scorer": FakeScorer(), **options})
    assert policy.forward_calls == 0


@pytest.mark.parametrize("prompts", ["text", Prompt(text="text"), {"role": "user", "content": "x"}, 5, None])
def test_one_prompt_is_not_a_list(prompts: object) -> None:
    with pytest.raises(TypeError, match=r"pass \[prompt\]"):
        look(prompts)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([[1], ""], ValueError, r"prompts\[1\]: empty prompt"),
        ([[1], [2], []], ValueError, r"prompts\[2\]: empty prompt"),
        ([[1] * 20], ValueError, r"prompts\[0\]: the prompt has 20 tokens; the context of 9"),
        ([1, 2, 3], TypeError, r"prompts\[0\]: prompt must be"),
        ([[{"role": "user", "content": "x"}], None], TypeError, r"prompts\[1\]: prompt must be"),
    ],
)
def test_bad_prompts_are_named_before_anything_is_sampled(prompts: list[Any], error: type, message: str) -> None:
    policy = FakePolicy(context=9)
    with pytest.raises(error, match=message):
        look(prompts, policy)
    assert policy.forward_calls == 0
    assert not policy.trees


def test_no_prompts() -> None:
    assert look([]) == []
    assert look(iter([])) == []


def test_all_kinds_of_prompts() -> None:
    kinds = ["ab", list(ids("ab")), [{"role": "user", "content": "ab"}], Prompt(text="ab")]
    results = look(iter(kinds), strategy=BestOfN(2))
    assert [result.tree.prompt_ids for result in results] == [ids("ab")] * 4
    assert [result.tree.occurrence for result in results] == [0, 1, 2, 3]  # the same tokens, whatever they came as
