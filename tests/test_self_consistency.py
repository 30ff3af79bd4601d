"""SelfConsistency: what decides its vote, that nothing else does, and that what is no longer needed is given up."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from fake_vllm import FakeEngine, FakeLLM, install
from fakes import RULE, Child, FakeAsyncPolicy, FakePolicy, FakeScorer, ToyLM
from hypothesis import given, settings, strategies as st
from search_cases import SEEDS, play, texts
from soak import examples

import prm_search as ps
from prm_search.answers.tally import Tally
from prm_search.confidence import group_confidences, trace_confidence
from prm_search.driver.driver import Driver
from prm_search.integrations.vllm import VLLMPolicy
from prm_search.search import SearchSettings, asearch
from prm_search.serving.model_thread import ModelThread, ThreadPolicy
from prm_search.strategies import SelfConsistency
from prm_search.strategies.self_consistency import ahead
from prm_search.tree import SearchTree

STOPS = st.sampled_from(["adaptive", "beta"])


def drawn(answers: str, **options: Any) -> int:
    """How many of these answers, a letter each, are drawn."""
    result, _ = play({"": [f"{letter}." for letter in answers]}, SelfConsistency(n=len(answers), **options))
    assert set(result.candidates) == set(result.tree.nodes[1:])
    return len(result.candidates)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (4, 0), (3, 1), (2, 2), (1, 5), (30, 20)])
def test_the_posterior_is_the_integral_of_its_density(first: int, second: int) -> None:
    share = np.linspace(0, 1, 200_001)
    density = share**first * (1 - share) ** second
    above = np.trapezoid(density[100_000:], share[100_000:]) / np.trapezoid(density, share)
    assert math.isclose(ahead(first, second), above, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("answers", "stop", "count"),
    [
        ("aaaaaaaa", "beta", 4),  # 1 - 1/32
        ("baaaaaaaaa", "beta", 7),  # 6 to 1: 1 - 9/256; 5 to 1: 1 - 8/128
        ("abababab", "beta", 8),  # never
        ("aabbbbbbbbbb", "beta", 10),  # 8 to 2: 1 - 67/2048; 7 to 2: 1 - 56/1024
        ("aaaaaaaa", "adaptive", 2),
        ("abaaaaaa", "adaptive", 4),  # 3 of 4
        ("abbaaaaaaa", "adaptive", 8),  # 6 of 8, though 3 of 4 would have been ahead at 7 already
        ("ababababab", "adaptive", 10),
        ("aaaaaaaa", None, 8),
    ],
)
def test_drawing_ends_when_the_vote_is_decided(answers: str, stop: Any, count: int) -> None:
    if stop is None:
        result, _ = play({"": [f"{letter}." for letter in answers]}, SelfConsistency(len(answers)))
        assert sum(node.count for node in result.candidates) == count
        return
    assert drawn(answers, stop=stop) == count
    assert drawn(answers, stop=stop, wave=1) == count


def test_thresholds_are_the_users() -> None:
    assert drawn("aaaaaaaaaaaa", stop="beta", threshold=0.999) == 9  # 1 - 2**-10
    assert drawn("abaaaaaa", stop="adaptive", threshold=0.9) == 8
    assert drawn("abaaaaaa", stop="adaptive", threshold=0.6) == 4


@settings(max_examples=examples(60))
@given(
    stop=STOPS, n=st.integers(1, 12), wave=st.integers(1, 12), seed=SEEDS, rows=st.none() | st.integers(1, 4),
    order=st.booleans(), limit=st.integers(2, 12),
)  # fmt: skip
def test_neither_waves_nor_batches_change_what_is_decided(
    stop: Any, n: int, wave: int, seed: int, rows: int | None, order: bool, limit: int
) -> None:
    """The draws that count are the first ones, whichever end first; they are those of BestOfN."""

    def turned(children: list[Child]) -> list[Child]:
        return children[::-1] if order else children

    def look(strategy: Any, policy: FakePolicy) -> ps.Result:
        options: dict[str, Any] = {"steps": RULE, "max_new_tokens": limit, "seed": seed}
        (result,) = ps.search([[5]], policy=policy, strategy=strategy, **options)
        return result

    one_by_one = look(SelfConsistency(n, stop), FakePolicy())
    at_once = look(SelfConsistency(n, stop, wave=wave), FakePolicy(rows=rows, order=turned))
    paths = [node.path_ids() for node in at_once.candidates]
    assert sorted(paths) == sorted(node.path_ids() for node in one_by_one.candidates)
    assert (at_once.text, at_once.stopped) == (one_by_one.text, one_by_one.stopped)
    assert at_once.usage.sampled_tokens["policy"] >= sum(map(len, paths))
    assert one_by_one.usage.sampled_tokens["policy"] == sum(map(len, paths))  # nothing is wasted
    whole = look(ps.BestOfN(n), FakePolicy())
    assert {tuple(path) for path in paths} <= {tuple(node.path_ids()) for node in whole.candidates}


def test_many_prompts_give_up_their_own_draws_only() -> None:
    options: dict[str, Any] = {"steps": RULE, "max_new_tokens": 12, "answer": lambda text: text[:1] or None}
    prompts = [[prompt] for prompt in range(3, 15)]
    for wave in (None, 1, 5, 16):
        strategy = SelfConsistency(16, "beta", wave=wave)
        together = ps.search(prompts, policy=FakePolicy(rows=20), strategy=strategy, **options)
        for prompt, result in zip(prompts, together, strict=True):
            (alone,) = ps.search([prompt], policy=FakePolicy(), strategy=strategy, **options)
            assert [end.path_ids() for end in result.candidates] == [end.path_ids() for end in alone.candidates]
            assert result.answer == alone.answer


class Halting(FakePolicy):
    """Tells what is under way whenever requests are dropped."""

    def __init__(self, lm: ToyLM) -> None:
        super().__init__(lm)
        self.dropped = 0
        self.lost = 0

    def drop(self, requests: Any) -> None:
        self.dropped += len(requests)
        self.lost += sum(child.sampled for request in requests for child in self.requests[request])
        super().drop(requests)


def test_what_is_still_drawn_is_given_up_and_counted() -> None:
    policy = Halting(ToyLM("ab.", seed=2))
    (result,) = ps.search(
        [[5]], policy=policy, strategy=SelfConsistency(40, "beta", wave=40), steps=RULE, max_new_tokens=30,
        answer=lambda text: "same",
    )  # fmt: skip
    assert len(result.candidates) == 4
    assert policy.dropped > 0
    assert not policy.requests
    assert not policy.trees
    told = sum(len(node.token_ids) for node in result.tree.nodes[1:])
    assert result.usage.sampled_tokens["policy"] == told + policy.lost
    assert result.stopped == "finished"
    assert (result.answer, result.selection.votes[0].votes) == ("same", 4)  # type: ignore[union-attr]
    (whole,) = ps.search([[5]], policy=FakePolicy(policy.lm), strategy=ps.BestOfN(40), steps=RULE, max_new_tokens=30)
    assert result.usage.sampled_tokens["policy"] < whole.usage.sampled_tokens["policy"]


def test_coroutines_of_what_is_given_up_end() -> None:
    policy = FakeAsyncPolicy(ToyLM("ab.", seed=2), pauses=lambda request: 50 * (request.lineages[0] % 2))
    (result,) = asyncio.run(
        asearch(
            [[5]], policy=policy, strategy=SelfConsistency(40, "beta", wave=40), steps=RULE, max_new_tokens=30,
            answer=lambda text: "same",
        )
    )  # fmt: skip
    assert len(result.candidates) == 4
    assert not policy.running
    assert policy.calls == 40


class Patient(Halting):
    """Draws no further once the answers that decide the vote are there, until it is told to drop the others."""

    def __init__(self, lm: ToyLM) -> None:
        super().__init__(lm)
        self.came: list[Any] = []
        self.answered: set[Any] = set()

    def submit(self, requests: Any) -> None:
        self.came += requests
        super().submit(requests)

    def advance(self) -> Any:
        if len(self.came) == 40 and self.answered.issuperset(self.came[:4]) and not self.dropped:
            return []
        ended = super().advance()
        self.answered.update(request for request, _ in ended)
        return ended


def test_a_thread_of_models_drops_what_is_given_up() -> None:
    policy = Patient(ToyLM("ab.", seed=2))

    async def run() -> ps.Result:
        thread = ModelThread()
        try:
            (result,) = await asearch(
                [[5]], policy=ThreadPolicy(thread, policy), strategy=SelfConsistency(40, "beta", wave=40), steps=RULE,
                max_new_tokens=30, answer=lambda text: "same",
            )  # fmt: skip
            return result
        finally:
            thread.close()

    result = asyncio.run(run())
    assert len(result.candidates) == 4
    assert policy.dropped > 0
    assert not policy.requests
    told = sum(len(node.token_ids) for node in result.tree.nodes[1:])
    assert result.usage.sampled_tokens["policy"] == told + policy.lost


def test_vllm_aborts_what_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    engine = FakeEngine(ToyLM("ab.", seed=2))
    (result,) = ps.search(
        [[5]], policy=VLLMPolicy(FakeLLM(engine)), strategy=SelfConsistency(40, "beta", wave=40), steps=RULE,
        max_new_tokens=30, answer=lambda text: "same",
    )  # fmt: skip
    assert len(result.candidates) == 4
    assert engine.aborted
    assert not engine.running
    told = sum(len(node.token_ids) for node in result.tree.nodes[1:])
    assert result.usage.sampled_tokens["policy"] > told


def test_a_token_budget_holds_where_draws_are_given_up() -> None:
    for tokens in range(1, 60, 7):
        (result,) = ps.search(
            [[5]], policy=FakePolicy(ToyLM("ab.", seed=2)), strategy=SelfConsistency(12, "beta", wave=6), steps=RULE,
            max_new_tokens=30, budget=tokens,
        )  # fmt: skip
        assert result.usage.sampled_tokens["policy"] <= tokens
        assert result.candidates


def test_a_depth_budget_draws_step_by_step_and_decides_the_same() -> None:
    strategy = SelfConsistency(9, "beta", wave=9)
    options: dict[str, Any] = {"steps": RULE, "max_new_tokens": 12, "strategy": strategy}
    (free,) = ps.search([[5]], policy=FakePolicy(ToyLM("a.")), answer=lambda text: "x", **options)
    (bound,) = ps.search(
        [[5]], policy=FakePolicy(ToyLM("a.")), answer=lambda t: "x", budget=ps.Budget(depth=9), **options
    )
    assert [n.path_ids() for n in bound.candidates] == [n.path_ids() for n in free.candidates]
    assert len(bound.candidates) == 4


# --- votes ------------------------------------------------------------------------------------------------------------


def test_it_votes_unless_the_call_says_otherwise_and_needs_no_scorer() -> None:
    script = {"": ["a.", "b.", "b.", "c."]}
    result, _ = play(script, SelfConsistency(4))
    assert result.text == "b"  # c has the best value
    result, _ = play(script, SelfConsistency(4), select="best")
    assert result.text == "c"
    (result,) = ps.search([[5]], policy=FakePolicy(), strategy="self_consistency", steps=RULE, max_new_tokens=6)
    assert result.selection is not None
    assert result.selection.votes[0].votes == max(vote.votes for vote in result.selection.votes)
    (result,) = ps.search([[5]], policy=FakePolicy(), scorer=FakeScorer(), steps=RULE, max_new_tokens=6)
    assert result.selection is not None
    assert not result.selection.votes  # others take the best


def test_a_tally_compares_as_the_vote_does_and_cut_answers_do_not_vote() -> None:
    tree = SearchTree("?")
    tally = Tally(lambda text: text or None)
    for text, finish in [("1/2", "stop"), ("0.5", "stop"), (".5", "length"), ("\\frac12", "stop"), ("7", "stop")]:
        tally.add(tree.add(tree.root, [1], text=text, finish=finish))
    tally.add(tree.add(tree.root, [1], text="", finish="stop"))
    assert (tally.draws, tally.sums) == (6, [3.0, 1.0])
    whole = Tally(None)
    for text in ("1/2", "0.5", "0.5 "):
        whole.add(tree.add(tree.root, [1], text=text, finish="stop"), 0.5)
    assert whole.sums == [1.0, 0.5]


@pytest.mark.parametrize(("measure", "expected"), [("group", 1.5), ("bottom", 1.5), ("tail", 2.0), ("mean", 2.4)])
def test_measures_of_an_answer(measure: Any, expected: float) -> None:
    tree = SearchTree("?")
    first = tree.add(tree.root, [1, 1, 1])
    second = tree.add(first, [1, 1])
    first.confidences, second.confidences = np.array([5, 2, 1], np.float32), np.array([3, 1], np.float32)
    assert trace_confidence(second, measure, 2) == pytest.approx(expected)
    assert trace_confidence(second, "group", 99) == pytest.approx(2.4)  # no full group: all of it
    np.testing.assert_allclose(group_confidences(np.arange(25.0), 4), np.arange(22) + 1.5)
    long = SearchTree("?")
    end = long.add(long.root, [1] * 40)
    end.confidences = np.arange(40, dtype=np.float32)
    assert trace_confidence(end, "bottom", 1) == pytest.approx(np.mean([0, 1, 2, 3]))
    first.confidences = None
    with pytest.raises(ValueError, match="has no confidences"):
        trace_confidence(second, measure, 2)


def test_the_surest_answers_vote_with_their_confidence() -> None:
    options: dict[str, Any] = {"policy": FakePolicy(), "steps": RULE, "max_new_tokens": 8, "seed": 4}
    (whole,) = ps.search([[5]], strategy=ps.BestOfN(20), confidence_tokens=2, **options)
    complete = [end for end in whole.candidates if end.finish == "stop"]
    assert len(complete) > 4
    surest = sorted(complete, key=lambda end: -trace_confidence(end, "mean"))
    strategy = SelfConsistency(20, weight="confidence", keep=0.3, measure="mean", top=2)
    (result,) = ps.search([[5]], strategy=strategy, **options)
    left, kept = math.ceil(0.3 * sum(end.count for end in complete)), []
    while left > 0:
        kept.append(surest.pop(0))
        left -= kept[-1].count
    assert len(result.candidates) == len(whole.candidates)
    voters = [end for end in result.candidates if end.weight]
    assert sorted(texts(voters)) == sorted(texts(kept))
    for end in voters:
        assert end.weight == pytest.approx(trace_confidence(end, "mean") * end.count)
    assert result.selection is not None
    heaviest = max(result.candidates, key=lambda end: end.weight or 0.0)  # every text is an answer of its own
    assert result.selection.node is heaviest
    (plain,) = ps.search([[5]], strategy=SelfConsistency(20, keep=0.3, measure="mean", top=2), **options)
    assert {end.path_text(): end.weight for end in plain.candidates if end.weight} == {
        end.path_text(): end.count for end in kept
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n=0"), ({"stop": "soon"}, "stop='soon': it is None, 'adaptive' or 'beta'"),
        ({"weight": "value"}, "weight='value'"), ({"keep": 0}, "keep=0"), ({"keep": 1.5}, "keep=1.5"),
        ({"threshold": 0.5}, "threshold=0.5"), ({"wave": 0}, "wave=0"), ({"measure": "best"}, "measure='best'"),
        ({"window": 0}, "window=0"), ({"top": 0}, "top=0"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfConsistency(**wrong)


def test_confidences_are_asked_for_where_they_are_read() -> None:
    assert (SelfConsistency().confidence_tokens, SelfConsistency(keep=0.5).confidence_tokens) == (0, 20)
    deaf = FakePolicy()
    deaf.top_tokens = 0
    ps.search([[5]], policy=deaf, strategy=SelfConsistency(2), steps=RULE, max_new_tokens=4)
    for strategy in (SelfConsistency(2, weight="confidence"), ps.DeepConf()):
        with pytest.raises(ValueError, match="confidence_tokens=20: this policy tells no"):
            ps.search([[5]], policy=deaf, strategy=strategy, steps=RULE)
    with pytest.raises(ValueError, match=r"confidence_tokens=3: SelfConsistency\(.*reads them over 20 tokens"):
        ps.search([[5]], policy=FakePolicy(), strategy=SelfConsistency(2, keep=0.5), steps=RULE, confidence_tokens=3)


def test_enough_is_for_one_place_without_merging() -> None:
    class Wrong:
        def run(self, root: ps.Node) -> Any:
            yield ps.Expand([root], 2, enough=lambda node: True)
            return []

    with pytest.raises(ValueError, match="enough= needs one place and merge=False"):
        Driver().add(SearchTree(ps.Prompt(token_ids=(5,))), Wrong(), sampling=SearchSettings.make().sampling)
