"""DeepConf against the same answers drawn whole: where the weak ones are stopped, who votes, and when drawing ends."""

from __future__ import annotations

from typing import Any

import hf_models as hf
import numpy as np
import pytest
from exact import exact
from fake_vllm import FakeEngine, FakeLLM, install
from fakes import RULE, FakePolicy, ToyLM
from hypothesis import given, settings, strategies as st
from search_cases import SEEDS
from soak import examples

import prm_search as ps
from prm_search.confidence import path_confidences, trace_confidence
from prm_search.integrations.vllm import VLLMPolicy
from prm_search.strategies import DeepConf
from prm_search.tree import Node


def by_hand(answers: list[Node], config: DeepConf) -> tuple[list[int], list[float]]:
    """Tokens of each answer that DeepConf draws of these whole ones, in their order, and its vote, 0 for none."""
    lows = [trace_confidence(end, "group", config.window) for end in answers]
    bar = np.quantile(lows[: config.warmup], 1 - config.keep)
    lengths, votes, sums = [], [], dict[str, float]()
    for place, end in enumerate(answers):
        confidences = path_confidences(end).astype(np.float64)
        length = len(confidences)
        if place >= config.warmup:
            groups = [confidences[: i + 1][-config.window :].mean() for i in range(len(confidences))]
            weak = [i + 1 for i in range(config.window - 1, length - 1) if groups[i] < bar]
            length = weak[0] if weak else length
        lengths.append(length)
        votes.append(lows[place] if lows[place] >= bar and length == len(confidences) else 0.0)
        text = end.path_text().strip()
        if end.finish == "stop" and text:
            sums[text] = sums.get(text, 0.0) + votes[-1]
        agreed = (
            sum(sums.values()) > 0
            and config.consensus is not None
            and max(sums.values()) >= config.consensus * sum(sums.values())
        )
        if place >= config.warmup - 1 and agreed:
            break
    return lengths, votes


def search(config: Any, policy: Any, **options: Any) -> ps.Result:
    (result,) = ps.search([[5]], policy=policy, strategy=config, **{"steps": RULE, "max_new_tokens": 14, **options})
    return result


@settings(max_examples=examples(40))
@given(
    warmup=st.integers(1, 4), budget=st.integers(4, 12), keep=st.sampled_from([0.1, 0.5, 0.9]),
    window=st.integers(1, 5), consensus=st.sampled_from([None, 0.5, 0.95]), wave=st.none() | st.integers(1, 6),
    seed=SEEDS, sharpness=st.sampled_from([1.0, 2.0]), rows=st.none() | st.integers(1, 3),
)  # fmt: skip
def test_weak_answers_are_stopped_and_the_sure_ones_vote(
    warmup: int, budget: int, keep: float, window: int, consensus: float | None, wave: int | None, seed: int,
    sharpness: float, rows: int | None,
) -> None:  # fmt: skip
    config = DeepConf(warmup, budget, keep, window, top=2, consensus=consensus, wave=wave)
    lm = ToyLM("ab;.", seed=seed % 50, sharpness=sharpness)

    class Whole:
        """Every answer of the budget, in the order of the draws."""

        confidence_tokens = 2

        def run(self, root: Node) -> Any:
            return (yield ps.Expand([root], budget, until="end", merge=False))

    whole = search(Whole(), FakePolicy(lm), seed=seed)
    answers = sorted(whole.candidates, key=lambda end: end.path()[0].index)
    lengths, votes = by_hand(answers, config)
    result = search(config, FakePolicy(lm, rows=rows), seed=seed)
    drawn = {tuple(end.path_ids()) for end in result.tree.nodes[1:] if not end.children}
    counted = list(zip(answers, lengths, votes, strict=False))
    assert {tuple(end.path_ids()[:length]) for end, length, _ in counted} <= drawn
    voting = sorted((end.path_ids(), round(vote, 5)) for end, _, vote in counted if vote)
    assert len(result.candidates) == len(lengths)
    if voting:
        weights = [(end.path_ids(), round(end.weight or 0.0, 5)) for end in result.candidates if end.weight]
        assert sorted(weights) == voting
        assert not any(end.weight for end in result.candidates if end.finish == "weak")
    assert result.stopped in ("finished", "length")


def test_the_vote_is_weighted_and_the_weak_are_out_of_it() -> None:
    config = DeepConf(4, 24, 0.5, window=3, top=2, consensus=None, wave=20)
    result = search(config, FakePolicy(ToyLM("ab;.", seed=3)), answer=lambda text: str(text.count("a")))
    weak = [end for end in result.tree.nodes[1:] if end.finish == "weak"]
    assert weak
    assert all(end.finished and end.weight == 0 for end in weak)
    assert result.selection is not None
    totals: dict[str, float] = {}
    for end in result.candidates:
        if end.finish == "stop":
            answer = str(end.path_text().count("a"))
            totals[answer] = totals.get(answer, 0.0) + (end.weight or 0.0)
    assert result.answer == max(totals, key=lambda answer: totals[answer])
    assert result.selection.votes[0].weight == pytest.approx(max(totals.values()))
    again = ps.SearchTree.from_json(result.tree.to_json())
    assert [node.finish for node in again] == [node.finish for node in result.tree]


def test_consensus_ends_the_drawing_and_saves_tokens() -> None:
    options: dict[str, Any] = {"answer": lambda text: "same"}
    policy = FakePolicy(ToyLM("ab;.", seed=3))
    few = search(DeepConf(4, 40, 0.5, window=3, top=2), policy, **options)
    many = search(DeepConf(4, 40, 0.5, window=3, top=2, consensus=None), policy, **options)
    assert len(few.tree.root.children) == 4  # the warm-up agrees
    assert len(many.tree.root.children) == 40
    whole = search(DeepConf(40, 40, 0.5, window=3, top=2, consensus=None), policy, **options)
    assert many.usage.sampled_tokens["policy"] < whole.usage.sampled_tokens["policy"]


def test_step_by_step_under_a_depth_budget_stops_at_the_same_tokens() -> None:
    """A group reaches over the ends of steps."""
    config = DeepConf(4, 16, 0.5, window=4, top=2, consensus=None, wave=16)
    free = search(config, FakePolicy(ToyLM("ab;.", seed=3)))
    bound = search(config, FakePolicy(ToyLM("ab;.", seed=3)), budget=ps.Budget(depth=30))
    assert any(end.finish == "weak" for end in free.tree)

    def ends(result: ps.Result) -> list[Any]:
        return sorted((end.path_ids(), end.finish) for end in result.tree.nodes[1:] if not end.children)

    assert ends(bound) == ends(free)


def test_the_hf_engine_and_vllm_stop_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DeepConf(3, 12, 0.3, window=4, consensus=None, wave=9)
    policy = ps.HFPolicy(exact(hf.llama(3)), hf.tokenizer())
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0}
    result = search(config, policy, **options)
    whole = search(ps.BestOfN(12), policy, confidence_tokens=20, **options)
    answers = sorted(whole.candidates, key=lambda end: end.path()[0].index)
    assert len(answers) == 12
    lengths, _ = by_hand(answers, config)
    ends = {tuple(end.path_ids()) for end in result.tree.nodes[1:] if not end.children}
    assert ends == {tuple(end.path_ids()[:length]) for end, length in zip(answers, lengths, strict=True)}
    assert min(lengths) < 16
    install(monkeypatch)
    engine = FakeEngine(ToyLM("ab;.", seed=3))
    result = search(DeepConf(4, 24, 0.5, window=3, top=2, consensus=None, wave=20), VLLMPolicy(FakeLLM(engine)))
    assert any(end.finish == "weak" for end in result.tree)
    assert engine.aborted  # as soon as they are weak
    assert not engine.running


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": 0}, "warmup=0"), ({"budget": 8}, "budget=8: at least the 16 answers"), ({"keep": 0}, "keep=0"),
        ({"keep": 1.1}, "keep=1.1"), ({"window": 0}, "window=0"), ({"top": 0}, "top=0"),
        ({"consensus": 0}, "consensus=0"), ({"wave": 0}, "wave=0"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepConf(**wrong)
