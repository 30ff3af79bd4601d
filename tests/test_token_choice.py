"""Steer(below=, candidates=): the scorer takes the token where the policy is unsure, in the rows or as nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hf_models as hf
import numpy as np
import pytest
import torch
from exact import exact
from fake_vllm import FakeEngine, FakeLLM, install
from fakes import EOS, RULE, FakeAsyncPolicy, FakePolicy, FakeScorer, ToyLM
from hypothesis import given, settings, strategies as st
from soak import examples

import prm_search as ps
from prm_search.confidence import confidence_threshold
from prm_search.integrations.vllm import VLLMPolicy
from prm_search.search import SearchLoop, SearchSettings, asearch
from prm_search.strategies import BestOfN, Steer

PROMPTS = [[4, 9, 30], [70, 71, 5, 6]]
Table = Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]  # path -> probabilities, and what each token is worth


def by_hand(table: Table, strategy: Steer, length: int, end: int) -> tuple[list[int], int]:
    """The greedy response, token by token, and how many of its tokens were chosen."""
    path: list[int] = []
    chosen = 0
    while len(path) < length and (not path or path[-1] != end):
        probs, worth = table(path)
        token = int(probs.argmax())
        if strategy.below is None or probs.max() < strategy.below:
            best = np.argsort(-probs, kind="stable")[: strategy.candidates]
            token, chosen = int(best[worth[best].argmax()]), chosen + 1
        path.append(token)
    return path, chosen


# --- over fakes: every candidate is a node ----------------------------------------------------------------------------

REWARD = FakeScorer().reward


def toy_table(lm: ToyLM) -> Table:
    def table(path: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        probs, worth = np.zeros(128), np.zeros(128)
        probs[list(lm.vocabulary)] = lm.probs([5, *path])
        worth[list(lm.vocabulary)] = [REWARD((5,), (*path, token)) for token in lm.vocabulary]
        return probs, worth

    return table


STRATEGIES = st.builds(
    Steer, below=st.none() | st.sampled_from([0.35, 0.5, 0.8]), candidates=st.integers(2, 4), n=st.integers(1, 3),
    confidence_of=st.sampled_from(["top", "drawn"]),
)  # fmt: skip


@settings(max_examples=examples(60))
@given(strategy=STRATEGIES, seed=st.integers(0, 200), rows=st.none() | st.integers(1, 2), limit=st.integers(1, 14))
def test_the_scorer_takes_each_token_of_which_the_policy_is_unsure(
    strategy: Steer, seed: int, rows: int | None, limit: int
) -> None:
    """The first too, and one behind another. Greedy, where the drawn token is the top one."""
    lm = ToyLM(seed=seed)
    (result,) = ps.search(
        [[5]], policy=FakePolicy(lm, rows=rows), scorer=FakeScorer(), strategy=strategy, steps=RULE,
        max_new_tokens=limit, temperature=0.0,
    )  # fmt: skip
    path, chosen = by_hand(toy_table(lm), strategy, limit, EOS)
    assert [end.path_ids() for end in result.candidates] == [path]
    assert sum(end.count for end in result.candidates) == strategy.n
    ranked = [node for node in result.tree.nodes[1:] if node.rollout]
    assert len(ranked) == chosen * (min(strategy.candidates or 0, 4) - 1)  # those that were not taken


def test_a_candidate_is_one_token_and_value_ranks_the_answers_only() -> None:
    lm, strategy = ToyLM(seed=1), Steer(n=4, below=0.5, candidates=3, value="min")
    (result,) = ps.search(
        [[5]], policy=FakePolicy(lm), scorer=FakeScorer(), strategy=strategy, steps=RULE, max_new_tokens=10, seed=3
    )
    for node in result.tree.nodes[1:]:
        siblings = [child for child in (node.parent or node).children if child.rollout]
        if node.rollout or siblings:
            continue
        for place in range(1, len(node.token_ids)):  # nothing unsure was drawn over
            before = [5, *(node.parent or node).path_ids(), *node.token_ids[:place]]
            assert lm.probs(before).max() >= 0.5
    complete = [end for end in result.candidates if end.finish == "stop"] or result.candidates
    assert result.value == max(end.value for end in complete if end.value is not None)


def test_vllm_and_coroutines_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for seed in range(4):
        lm, strategy = ToyLM(seed=seed), Steer(below=0.5, candidates=3, confidence_of="drawn")
        options: dict[str, Any] = {
            "scorer": FakeScorer(), "strategy": strategy, "steps": RULE, "max_new_tokens": 12, "temperature": 0.0,
        }  # fmt: skip
        path, _ = by_hand(toy_table(lm), strategy, 12, EOS)
        for burst in (1, 3):
            engine = FakeEngine(lm, burst=burst)
            (result,) = ps.search([[5]], policy=VLLMPolicy(FakeLLM(engine)), **options)
            assert result.token_ids == path
            assert not engine.running
        (result,) = asyncio.run(asearch([[5]], policy=FakeAsyncPolicy(lm), **options))
        assert result.token_ids == path


def test_a_budget_ends_it_with_an_answer() -> None:
    for tokens in range(2, 20):
        (result,) = ps.search(
            [[5]], policy=FakePolicy(), scorer=FakeScorer(), strategy=Steer(n=2, below=0.5, candidates=2), steps=RULE,
            max_new_tokens=12, budget=tokens,
        )  # fmt: skip
        assert result.usage.sampled_tokens["policy"] <= tokens
        assert result.candidates


# --- over a model: a pair's numbers are in the rows -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return hf.tokenizer()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    policy = exact(hf.llama(0))
    return policy, hf.near(policy, 1, 0.1), hf.near(policy, 2, 0.1)


@pytest.fixture(scope="module")
def pair(models: Any, tokenizer: Any) -> ps.ImplicitPRM:
    return ps.ImplicitPRM(models[1], models[2], tokenizer=tokenizer, beta=0.1)


@pytest.fixture(scope="module")
def policy(models: Any, tokenizer: Any) -> ps.HFPolicy:
    return ps.HFPolicy(models[0], tokenizer)


def model_table(models: Any, prompt: list[int]) -> Table:
    @torch.no_grad()
    def table(path: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = torch.tensor([[*prompt, *path]])
        rows = [model(ids).logits[0, -1].double().log_softmax(-1).numpy() for model in models]
        return np.exp(rows[0]), rows[1] - rows[2]

    return table


@pytest.mark.parametrize("measure", ["top", "drawn"])
@pytest.mark.parametrize(("below", "candidates"), [(0.3, 3), (None, 2), (0.15, 258)])
def test_rows_and_nodes_choose_what_plain_forwards_choose(
    models: Any, policy: ps.HFPolicy, pair: ps.ImplicitPRM, below: float | None, candidates: int, measure: Any
) -> None:
    strategy = Steer(below=below, candidates=candidates, confidence_of=measure)
    options: dict[str, Any] = {"strategy": strategy, "steps": hf.STEPS, "max_new_tokens": 10, "temperature": 0.0}
    rows = ps.search(PROMPTS, policy=policy, scorer=pair, **options)
    chosen = 0
    for prompt, result in zip(PROMPTS, rows, strict=True):
        path, count = by_hand(model_table(models, prompt), strategy, 10, hf.EOS)
        chosen += count
        assert result.token_ids == path
        assert [node for node in result.tree.nodes[1:] if node.rollout] == []
        assert result.usage.encoded_tokens["prm"] <= len(prompt) + len(path)  # the candidates cost nothing
        assert result.usage.sampled_tokens["policy"] == len(path)
    assert chosen > 3
    if candidates > 3:
        return  # as nodes, the whole vocabulary
    with SearchLoop(policy, pair) as loop:  # the policy is not steered: candidates are nodes
        for prompt in PROMPTS:
            loop.add(ps.Prompt(token_ids=tuple(prompt)), SearchSettings.make(**options))
        nodes: list[ps.Result] = []
        while loop.active:
            nodes += loop.step()
    assert sorted(result.token_ids for result in nodes) == sorted(result.token_ids for result in rows)
    assert any(node.rollout for result in nodes for node in result.tree.nodes[1:])


def test_drawn_tokens_stand_where_they_are_probable_enough(
    models: Any, policy: ps.HFPolicy, pair: ps.ImplicitPRM
) -> None:
    """At a temperature. Up to the first that is not, the draws are those of the unsteered policy."""
    options: dict[str, Any] = {"policy": policy, "steps": hf.STEPS, "max_new_tokens": 16, "temperature": 1.0}
    strategy = Steer(below=0.05, candidates=3, confidence_of="drawn")
    changed = 0
    for prompt, result, plain in zip(
        PROMPTS,
        ps.search(PROMPTS, scorer=pair, strategy=strategy, **options),
        ps.search(PROMPTS, strategy=BestOfN(1), **options),
        strict=True,
    ):
        table = model_table(models, prompt)
        same = True
        for place, token in enumerate(result.token_ids):
            probs, worth = table(result.token_ids[:place])
            best = np.argsort(-probs, kind="stable")[:3]
            choice = int(best[worth[best].argmax()])
            assert probs[token] >= 0.05 or token == choice
            if same:
                drawn = plain.token_ids[place]
                assert token == (drawn if probs[drawn] >= 0.05 else choice)
                same = token == drawn
                changed += not same
    assert changed


def test_alpha_steers_only_where_the_policy_is_unsure(models: Any, policy: ps.HFPolicy, pair: ps.ImplicitPRM) -> None:
    strategy = Steer(alpha=2.0, below=0.3)
    results = ps.search(
        PROMPTS, policy=policy, scorer=pair, strategy=strategy, steps=hf.STEPS, max_new_tokens=10, temperature=0.0
    )
    differs = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        table = model_table(models, prompt)
        for place, token in enumerate(result.token_ids):
            probs, ratio = table(result.token_ids[:place])
            guided = np.log(probs) + 2.0 * ratio if probs.max() < 0.3 else probs
            assert token == int(guided.argmax())
            differs += token != int(probs.argmax())
    assert differs


def test_generate_takes_it(models: Any, pair: ps.ImplicitPRM, tokenizer: Any) -> None:
    model = models[0]
    ps.enable(model, tokenizer)
    try:
        inputs = tokenizer(["2+2="], return_tensors="pt")
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
            prm_guidance=ps.PRMGuidance(pair, strategy=Steer(below=0.3, candidates=3), steps=hf.STEPS),
        )  # fmt: skip
    finally:
        ps.disable(model)
    prompt = inputs["input_ids"][0].tolist()
    path, _ = by_hand(model_table(models, prompt), Steer(below=0.3, candidates=3), 8, hf.EOS)
    assert out.prm[0].token_ids == path


# --- refusals and calibration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"below": 0}, "below=0"), ({"below": 1.1}, "below=1.1"), ({"candidates": 1}, "candidates=1"),
        ({"confidence_of": "worst"}, "confidence_of='worst'"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steer(**wrong)


def test_policies_that_cannot_are_refused_before_anything_is_drawn(policy: ps.HFPolicy, pair: ps.ImplicitPRM) -> None:
    deaf = FakePolicy()
    deaf.ranks = False
    options: dict[str, Any] = {"steps": RULE, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="candidates=3: this policy offers no most probable tokens"):
        ps.search([[5]], policy=deaf, scorer=FakeScorer(), strategy=Steer(candidates=3), **options)
    with pytest.raises(ValueError, match="candidates=5: this policy offers 4 most probable tokens"):
        ps.search([[5]], policy=FakePolicy(), scorer=FakeScorer(), strategy=Steer(candidates=5), **options)
    with pytest.raises(ValueError, match="needs scorer="):
        ps.search([[5]], policy=FakePolicy(), strategy=Steer(candidates=3), **options)
    steered = Steer(below=0.3, candidates=3).wrap(policy, pair)
    for other in (Steer(candidates=3), Steer(1.0), Steer(1.0, below=0.3)):
        with pytest.raises(ValueError, match="wrap"):
            SearchLoop(steered, pair).add(ps.Prompt(token_ids=(4,)), SearchSettings.make(strategy=other))


@pytest.mark.parametrize("measure", ["top", "drawn"])
def test_the_threshold_is_that_of_the_lowest_share(measure: Any) -> None:
    lm = ToyLM(seed=5)
    results = ps.search(
        [[5], [6]], policy=FakePolicy(lm), strategy=BestOfN(8), steps=RULE, max_new_tokens=9, confidence_tokens=1
    )
    probabilities = []
    for result in results:
        for node in result.tree.nodes[1:]:
            for place, token in enumerate(node.token_ids):
                before = [*result.tree.prompt_ids, *(node.parent or node).path_ids(), *node.token_ids[:place]]
                probs = lm.probs(before)
                of = probs.max() if measure == "top" else probs[lm.vocabulary.index(token)]
                probabilities += [float(of)] * node.count
    trees = [result.tree for result in results]
    threshold = confidence_threshold(trees, measure, 0.25)
    assert threshold == pytest.approx(sorted(probabilities)[int(0.25 * len(probabilities))], rel=1e-6)
    assert confidence_threshold(trees) <= threshold
    with pytest.raises(ValueError, match="no sampled token"):
        confidence_threshold([])
    with pytest.raises(ValueError, match="confidence_of='worst'"):
        confidence_threshold(trees, "worst")  # type: ignore[arg-type]
    (silent,) = ps.search([[5]], policy=FakePolicy(lm), strategy=BestOfN(1), steps=RULE, max_new_tokens=4)
    with pytest.raises(ValueError, match="has no confidences: for 'top', search with confidence_tokens=1"):
        confidence_threshold([silent.tree], "top")
