"""ByDifficulty: the first answers tell the bin, and nothing that was drawn is drawn again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fakes import RULE, FakePolicy, FakeScorer, step_scores
from search_cases import LETTERS, play, texts

from prm_search.driver.budget import Budget
from prm_search.search import search
from prm_search.strategies import (
    DVTS,
    MCTS,
    STRATEGIES,
    AdaptiveBranch,
    Beam,
    BestOfN,
    ByDifficulty,
    Lookahead,
    ParticleFilter,
    Rebase,
    Steer,
    named_strategy,
    plain_strategy,
)

SCRIPT = {"": ["a;", "d;"], "d;": ["a.", "b."], "a;": ["c.", "d."]}  # q of a;c is 2, of d;a 3


def asked(policy: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for text, n in policy.asked:
        counts[text] += n
    return dict(counts)


def test_the_mean_value_of_the_first_answers_tells_the_bin() -> None:
    for threshold, expected in ((2.4, 6), (2.6, 3)):  # the probe's mean is 2.5
        strategy = ByDifficulty(2, [threshold], [BestOfN(3), BestOfN(6)])
        result, policy = play(SCRIPT, strategy)
        assert asked(policy) == {"": expected}
        assert sum(node.count for node in result.candidates) == expected


def test_a_bin_of_whole_answers_draws_only_what_is_missing() -> None:
    alone, _ = play(SCRIPT, BestOfN(4))
    result, policy = play(SCRIPT, ByDifficulty(2, [], [BestOfN(4)]))
    assert policy.asked == [("", 2), ("", 2)]
    assert Counter(texts(result.candidates)) == Counter(t for n in alone.candidates for t in [n.path_text()] * n.count)
    _, policy = play(SCRIPT, ByDifficulty(4, [], [BestOfN(2)]))
    assert policy.asked == [("", 4)]


def test_the_first_steps_of_the_probe_are_the_first_children_of_a_beam() -> None:
    result, policy = play(SCRIPT, ByDifficulty(2, [], [Beam(1, 4)]))
    assert policy.asked == [("", 2), ("", 2), ("d;", 4)]
    assert "a;c" in texts(result.candidates)  # an answer of the probe stays a candidate


@pytest.mark.parametrize(
    "strategy",
    [
        Beam(2, 2), Lookahead(2, 2), ParticleFilter(3), MCTS(4, 2), Rebase(3), AdaptiveBranch(4), DVTS(2, 1, 2),
        AdaptiveBranch(4, until="step"), BestOfN(1),
    ],
    ids=lambda strategy: type(strategy).__name__,
)  # fmt: skip
def test_every_strategy_goes_on_from_a_probe_within_its_budget(strategy: Any) -> None:
    for tokens in (1, 9, 30, None):
        (result,) = search(
            [[5]], policy=FakePolicy(), scorer=FakeScorer(), strategy=ByDifficulty(2, [], [strategy]), steps=RULE,
            max_new_tokens=12, budget=Budget(tokens=tokens),
        )  # fmt: skip
        assert result.node is not None
        assert tokens is None or sum(result.usage.sampled_tokens.values()) <= tokens
        assert all(node.finished for node in result.candidates)


def test_plain_values_say_any_strategy_and_are_read_again() -> None:
    made = [kind() for kind in STRATEGIES.values()]
    made += [
        Beam(2, 8, value="min"),
        ByDifficulty(3, [0.5], [BestOfN(4), ParticleFilter(8, temperature=0.3)], value="q"),
    ]
    for strategy in made:
        assert named_strategy(plain_strategy(strategy)) == strategy
    plain = plain_strategy(made[-1])
    assert plain == {
        "name": "by_difficulty", "probe": 3, "thresholds": [0.5], "value": "q",
        "strategies": [{"name": "best_of_n", "n": 4}, {"name": "particle_filter", "particles": 8, "temperature": 0.3}],
    }  # fmt: skip
    with pytest.raises(ValueError, match="a file cannot hold the function value"):
        plain_strategy(Beam(value=lambda node: 0.0))
    with pytest.raises(ValueError, match="strategy: wide is no field of beam; it has width"):
        named_strategy({"name": "beam", "wide": 2})
    with pytest.raises(ValueError, match="strategy='None' is unknown"):
        named_strategy({"width": 2})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"probe": 0}, ValueError, "probe=0"),
        ({"thresholds": [0.5]}, ValueError, "strategies: 1 for 1 thresholds: one more is needed"),
        ({"thresholds": [1, 1], "strategies": [Beam()] * 3}, ValueError, "has to be above the one before it"),
        ({"thresholds": [float("nan")], "strategies": [Beam()] * 2}, ValueError, "thresholds"),
        ({"thresholds": "0.5"}, TypeError, "thresholds must be a list"),
        ({"strategies": [Beam]}, TypeError, "configured strategies"),
        ({"strategies": ["beam"]}, TypeError, "configured strategies"),
        ({"strategies": [Steer(1.0)]}, ValueError, "Steer cannot be a bin"),
        ({"strategies": [ByDifficulty()]}, ValueError, "ByDifficulty cannot be a bin"),
        ({"strategies": [Beam(value="min")]}, ValueError, "names a value"),
        ({"value": "best"}, ValueError, "value='best'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ByDifficulty(**fields)


def test_the_value_of_the_search_ranks_in_every_bin() -> None:
    scores = FakeScorer(step_scores(LETTERS))
    (result,) = search(
        ["?"], policy=FakePolicy(), scorer=scores, strategy=ByDifficulty(2, [], [Beam(2, 2)], value="min"), steps=RULE,
        max_new_tokens=12,
    )  # fmt: skip
    assert result.value == min(node.reward for node in result.node.path())
