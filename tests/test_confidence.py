"""How sure a policy is of each token: recorded when asked on every engine, and read by the rule of steps."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import hf_models as hf
import numpy as np
import pytest
import torch
from exact import exact
from fake_vllm import FakeAsyncLLM, FakeEngine, FakeLLM, install
from fakes import RULE, FakeBlockingPolicy, FakePolicy, ToyLM, children_of, finish, ids, sampling
from hypothesis import HealthCheck, given, settings, strategies as st

import prm_search as ps
from prm_search.engine.confidence import confidence_columns
from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMPolicy
from prm_search.protocols import Request
from prm_search.search import SearchLoop, SearchSettings, asearch
from prm_search.tree import Node, SearchTree

PROMPTS = [[4, 9, 30], [70, 71]]


@pytest.fixture(scope="module")
def policy() -> ps.HFPolicy:
    return ps.HFPolicy(exact(hf.llama(3)), hf.tokenizer())


@torch.no_grad()
def tables(policy: ps.HFPolicy, node: Node) -> np.ndarray:
    """[T, V] the policy's log-probabilities at each of the response's places, by one plain forward."""
    prompt, response = list(node.tree.prompt_ids), node.path_ids()
    rows = policy.lm.module(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return rows.double().log_softmax(-1).numpy()


def joined(node: Node, name: str) -> np.ndarray:
    return np.concatenate([getattr(part, name) for part in node.path()])


@pytest.mark.parametrize("tokens", [1, 3, 20, 10_000])
def test_confidence_is_minus_the_mean_of_the_top_logprobs(policy: ps.HFPolicy, tokens: int) -> None:
    """Before temperature and filters, whatever is drawn; of more tokens than there are, all."""
    results = ps.search(
        PROMPTS, policy=policy, strategy=ps.BestOfN(3), steps=hf.STEPS, max_new_tokens=12, temperature=0.7, top_k=5,
        confidence_tokens=min(tokens, policy.top_tokens),
    )  # fmt: skip
    for result in results:
        for end in result.candidates:
            rows = np.sort(tables(policy, end), axis=1)[:, ::-1]
            np.testing.assert_allclose(joined(end, "confidences"), -rows[:, :tokens].mean(1), rtol=1e-6)


def test_a_batch_mixes_searches_that_ask_for_several_and_for_none(policy: ps.HFPolicy) -> None:
    options: dict[str, Any] = {"strategy": ps.Beam(2, 2), "steps": hf.STEPS, "max_new_tokens": 8}
    with SearchLoop(policy) as loop:
        trees = {}
        for prompt, tokens in ((PROMPTS[0], 0), (PROMPTS[1], 2), (PROMPTS[0], 5)):
            made = SearchSettings.make(confidence_tokens=tokens, **options)
            trees[loop.add(ps.Prompt(token_ids=tuple(prompt)), made)] = tokens
        while loop.active:
            loop.step()
    for tree, tokens in trees.items():
        for node in tree.nodes[1:]:
            if not tokens:
                assert node.confidences is None
            elif node.finished:
                rows = np.sort(tables(policy, node), axis=1)[:, ::-1]
                np.testing.assert_allclose(joined(node, "confidences"), -rows[:, :tokens].mean(1), rtol=1e-6)


def test_nothing_is_computed_where_no_row_asks() -> None:
    class Unread:
        """A table that may not be touched."""

        shape = (2, 7)

    rows = children_of(Request.draw(SearchTree(ps.Prompt(token_ids=(1,))).root, 2, sampling()))
    assert confidence_columns(Unread(), rows) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", ["top", "drawn"])
@pytest.mark.parametrize("strategy", [ps.BestOfN(3), ps.Beam(3, 1)], ids=["whole", "step by step"])
def test_steps_begin_where_the_policy_is_unsure(policy: ps.HFPolicy, measure: Any, strategy: Any) -> None:
    """Of its best token, or of the one that it drew; the tokens are those of a search without the rule."""
    rule = ps.StepRule(None, max_tokens=None, confidence=0.3, confidence_of=measure)
    options: dict[str, Any] = {"policy": policy, "max_new_tokens": 24, "temperature": 1.0}
    results = ps.search(PROMPTS, strategy=strategy, steps=rule, **options)
    plain = ps.search(PROMPTS, strategy=ps.BestOfN(3), steps=ps.StepRule(None), **options)
    cuts = 0
    for result, other in zip(results, plain, strict=True):
        assert {tuple(end.path_ids()) for end in result.candidates} == {tuple(e.path_ids()) for e in other.candidates}
        for end in result.candidates:
            rows = np.exp(tables(policy, end))
            probabilities = rows.max(1) if measure == "top" else rows[range(len(rows)), end.path_ids()]
            begins = [node.start for node in end.path()[1:]]
            assert begins == [i for i in range(1, len(rows)) if probabilities[i] < 0.3]
            cuts += len(begins)
    assert cuts > 5


def test_ranked_children_are_the_most_probable_tokens(policy: ps.HFPolicy) -> None:
    """One token each, as steps; beside rows that draw."""
    tree = SearchTree(ps.Prompt(token_ids=tuple(PROMPTS[0])))
    other = SearchTree(ps.Prompt(token_ids=tuple(PROMPTS[1])))
    how = sampling(steps=hf.STEPS, confidence_tokens=1)
    ranked, drawn = Request.draw(tree.root, 4, how, ranked=True), Request.draw(other.root, 2, how)
    own = policy.session()
    own.submit([drawn, ranked])
    answers: dict[Request, list[Node]] = {}
    while len(answers) < 2:
        answers.update(own.advance())
    children = answers[ranked]
    table = tables(policy, children[0])[0]
    assert [child.token_ids for child in children] == [(int(token),) for token in np.argsort(-table)[:4]]
    assert all(child.finish in ("step", "stop") for child in children)
    np.testing.assert_allclose([float(child.logprobs[0]) for child in children], np.sort(table)[::-1][:4], rtol=1e-6)
    alone = Request.draw(SearchTree(ps.Prompt(token_ids=tuple(PROMPTS[1]))).root, 2, how)
    own.submit([alone])
    while alone not in answers:
        answers.update(own.advance())
    assert [child.token_ids for child in answers[alone]] == [child.token_ids for child in answers[drawn]]
    own.release(tree)
    own.release(other)
    own.release(alone.node.tree)


# --- the same over vLLM -----------------------------------------------------------------------------------------------


def expected(lm: ToyLM, request: Request) -> list[Node]:
    children = children_of(request)
    for child in children:
        while not child.done:
            child.step(lm)
    return finish(request, children, "toy")


def facts(children: Sequence[Node]) -> list[Any]:
    return [
        [(n.token_ids, n.finish, None if n.confidences is None else np.round(n.confidences, 5).tolist()) for n in path]
        for path in (child.path() for child in children)
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lm=st.builds(ToyLM, letters=st.sampled_from(["ab;.", "a;bc"]), order=st.integers(1, 4), seed=st.integers(0, 99)),
    measure=st.sampled_from(["top", "drawn"]),
    threshold=st.none() | st.sampled_from([0.3, 0.5]),
    tokens=st.integers(0, 3),
    ranked=st.booleans(),
    until=st.sampled_from(["step", "end"]),
    burst=st.integers(1, 4),
)
def test_vllm_records_the_same(
    monkeypatch: pytest.MonkeyPatch, lm: ToyLM, measure: Any, threshold: float | None, tokens: int, ranked: bool,
    until: Any, burst: int,
) -> None:  # fmt: skip
    install(monkeypatch)
    rule = ps.StepRule(";", 6, confidence=threshold, confidence_of=measure)
    how = sampling(steps=rule, temperature=0.0, confidence_tokens=tokens)
    until = "step" if ranked else until

    def request() -> Request:
        root = SearchTree(ps.Prompt(token_ids=ids("abc"))).root
        return Request.draw(root, 3, how, until=until, merge=False, ranked=ranked)

    wanted = facts(expected(lm, request()))
    engine = FakeEngine(lm, burst=burst)
    sync, first, second = VLLMPolicy(FakeLLM(engine)), request(), request()
    sync.submit([first])
    answered: list[tuple[Request, list[Node]]] = []
    while not answered:
        answered = sync.advance()
    assert facts(answered[0][1]) == wanted
    assert facts(asyncio.run(AsyncVLLMPolicy(FakeAsyncLLM(engine)).run(second))) == wanted
    asked = max(params.logprobs for _, _, params in engine.log)
    assert asked == max(tokens, 3 if ranked else 0, 1 if threshold is not None else 0)
    assert ranked <= all(params.max_tokens == 1 for _, _, params in engine.log)


def test_vllms_own_limit_is_the_policys(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    policy = VLLMPolicy(FakeLLM(FakeEngine()))
    assert policy.top_tokens == 20
    with pytest.raises(ValueError, match="confidence_tokens=21: this policy tells 20 most probable tokens at most"):
        ps.search([[97]], policy=policy, strategy="best_of_n", confidence_tokens=21)
    everything = FakeEngine()
    everything.vllm_config.model_config.max_logprobs = -1
    assert VLLMPolicy(FakeLLM(everything)).top_tokens == 128


# --- records ----------------------------------------------------------------------------------------------------------


def test_json_keeps_confidences_and_says_nothing_of_those_not_asked_for() -> None:
    options: dict[str, Any] = {"policy": FakePolicy(), "strategy": ps.BestOfN(2), "steps": RULE, "max_new_tokens": 6}
    (result,) = ps.search([[97]], confidence_tokens=2, **options)
    text = result.tree.to_json()
    again = SearchTree.from_json(text)
    for node, other in zip(result.tree.nodes[1:], again.nodes[1:], strict=True):
        assert node.confidences is not None
        np.testing.assert_array_equal(node.confidences, other.confidences)
        assert len(node.confidences) == len(node.token_ids)
    assert again.to_json() == text
    (silent,) = ps.search([[97]], **options)
    assert "confidences" not in silent.tree.to_json()
    record = json.loads(text)
    for wrong in ([0.5], "high", [None] * len(record["nodes"][1]["token_ids"])):
        record["nodes"][1]["confidences"] = wrong
        if len(record["nodes"][1]["token_ids"]) == 1 and wrong == [0.5]:
            continue
        with pytest.raises(ValueError, match=r"nodes\[1\].confidences"):
            SearchTree.from_json(json.dumps(record))


def test_twins_share_theirs_and_top_one_is_the_best_tokens_probability() -> None:
    lm = ToyLM()
    (result,) = ps.search(
        [[97]], policy=FakePolicy(lm), strategy=ps.BestOfN(6), steps=RULE, max_new_tokens=4, confidence_tokens=1
    )
    assert any(node.count > 1 for node in result.tree.nodes[1:])
    for node in result.tree.nodes[1:]:
        assert node.confidences is not None
        assert node.parent is not None
        path = [97, *node.parent.path_ids()]
        for place, confidence in enumerate(node.confidences.tolist()):
            assert math.isclose(math.exp(-confidence), lm.probs([*path, *node.token_ids[:place]]).max(), rel_tol=1e-6)


def test_a_policy_that_tells_nothing_is_refused_before_anything_is_drawn() -> None:
    policy = FakeBlockingPolicy()
    policy.top_tokens = 0
    options: dict[str, Any] = {"policy": policy, "strategy": "best_of_n", "steps": RULE, "confidence_tokens": 20}
    with pytest.raises(ValueError, match="confidence_tokens=20: this policy tells no probable tokens beside the drawn"):
        ps.search([[97]], **options)

    class Plain:
        """An AsyncPolicy that says nothing of itself."""

        id = "plain"

        def encode(self, prompt: ps.Prompt) -> tuple[int, ...]:
            return prompt.token_ids or ()

        async def run(self, request: Request) -> list[Node]:
            raise AssertionError("nothing is drawn")

        def release(self, tree: SearchTree) -> None: ...

    with pytest.raises(ValueError, match="confidence_tokens=20"):
        asyncio.run(asearch([[97]], **{**options, "policy": Plain()}))


@pytest.mark.parametrize(("wrong", "error"), [(-1, ValueError), (True, TypeError), (2.5, ValueError)])
def test_what_is_no_number_of_tokens_is_refused(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="confidence_tokens"):
        ps.search([[97]], policy=FakePolicy(), confidence_tokens=wrong)
    with pytest.raises(ValueError, match="confidence_of='worst': it is 'top' or 'drawn'"):
        ps.StepRule(confidence_of="worst")  # type: ignore[arg-type]
