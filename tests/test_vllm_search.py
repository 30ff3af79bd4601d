"""Step search over real vLLM engines on a CPU, on the pair that ships: three engines in this one process."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vllm reads it
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from prm_search.cli import main
from prm_search.demo import chains, pair_dir
from prm_search.driver.budget import Budget
from prm_search.driver.result import Result
from prm_search.driver.search_settings import SearchSettings
from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMImplicitPRM, VLLMPolicy
from prm_search.policies.hf import HFPolicy
from prm_search.scorers.implicit.implicit_prm import ConstantReference, ImplicitPRM
from prm_search.search import SearchLoop, asearch, search
from prm_search.steps import StepRule
from prm_search.strategies import Beam, BestOfN
from prm_search.tree import Node, Prompt, SearchTree

pytestmark = pytest.mark.vllm

RULE = StepRule(delimiter=";", max_tokens=16)
PROMPTS = [problem.prompt for problem in chains.problems(3, seed=7)]
# A prompt longer than a block, so that there is something to cache: the model's context is 128 tokens, a block 32.
LONG = "".join(problem.prompt for problem in chains.problems(2, seed=8))
OPTIONS: dict[str, Any] = {"steps": RULE, "max_new_tokens": 48, "temperature": 1.0}


class Engines(NamedTuple):
    """The pair on both kinds of engines. The reference of the pair that ships is the policy."""

    policy: Any
    prm: Any
    hf: HFPolicy
    pair: ImplicitPRM


ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "enable_chunked_prefill": False,  # which makes seeds safe on a CPU
}


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    from vllm import LLM

    hf = HFPolicy.from_pretrained(pair_dir() / "policy", dtype="float32")
    policy, prm = (LLM(str(pair_dir() / name), **ENGINE) for name in ("policy", "prm"))
    made = Engines(policy, prm, hf, ImplicitPRM.from_pretrained(pair_dir(), dtype="float32"))
    yield made
    for llm in made[:2]:
        llm.llm_engine.engine_core.shutdown()


def agree(engines: Engines, result: Result, name: str = "prm") -> None:
    """Step rewards and raw log-probs of a tree are those of the HF engine, to 1e-3 nat."""
    tree, beta = result.tree, engines.pair.beta
    copy = SearchTree(Prompt(token_ids=tree.prompt_ids))
    twins: dict[Node, Node] = {tree.root: copy.root}
    for node in tree.nodes[1:]:
        assert node.parent is not None
        twins[node] = copy.add(twins[node.parent], node.token_ids)
    engines.pair.score_nodes(list(twins.values()))
    for node, twin in twins.items():
        np.testing.assert_allclose(node.rewards.get(name, []), twin.rewards.get("prm", []), rtol=0, atol=beta * 1e-3)
        if node.parent is not None:
            assert abs(node.reward_of(name) - twin.reward) < beta * 1e-3
    engines.pair.release(copy)


def facts(results: list[Result]) -> list[Any]:
    return [(r.text, [(n.path_ids(), n.finish, n.count) for n in r.tree.nodes]) for r in results]


@pytest.mark.parametrize(
    "rule", [RULE, StepRule(delimiter=["+", "="], max_tokens=5), StepRule(delimiter=None, confidence=0.8)]
)
@pytest.mark.parametrize("strategy", [Beam(width=1, expansions=1), BestOfN(2)])
def test_greedy_steps_are_those_of_the_hf_engine(engines: Engines, rule: StepRule, strategy: Any) -> None:
    options: dict[str, Any] = {**OPTIONS, "steps": rule, "temperature": 0.0, "strategy": strategy}
    ours = search(PROMPTS, policy=VLLMPolicy(engines.policy), **options)
    theirs = search(PROMPTS, policy=engines.hf, **options)
    assert facts(ours) == facts(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for node, twin in zip(mine.tree.nodes[1:], other.tree.nodes[1:], strict=True):
            np.testing.assert_allclose(node.logprobs, twin.logprobs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strategy", [Beam(width=1, expansions=1), BestOfN(2)])
def test_stop_strings_end_responses_as_on_the_hf_engine(engines: Engines, strategy: Any) -> None:
    options: dict[str, Any] = {**OPTIONS, "temperature": 0.0, "strategy": strategy, "stop": ["e", "c*", "c+", "c-"]}
    ours = search(PROMPTS, policy=VLLMPolicy(engines.policy), **options)
    assert facts(ours) == facts(search(PROMPTS, policy=engines.hf, **options))
    assert [(result.text.count(";"), result.node.finish) for result in ours] == [(2, "stop")] * len(PROMPTS)
    assert all(result.text.endswith(";") for result in ours)


@pytest.mark.parametrize("strategy", [Beam(width=3, expansions=3), BestOfN(6)])
def test_rewards_agree_with_the_hf_engine_and_the_reference_is_free(engines: Engines, strategy: Any) -> None:
    pair = VLLMImplicitPRM(engines.prm, "policy", beta=engines.pair.beta)
    results = search([*PROMPTS, LONG], policy=VLLMPolicy(engines.policy), scorer=pair, strategy=strategy, **OPTIONS)
    for result in results:
        agree(engines, result)
        assert set(result.usage.encoded_tokens) == {"policy", "prm"}
        assert result.usage.sampled_tokens["policy"] == sum(len(n.token_ids) * n.count for n in result.tree.nodes)
        # No token was new to the PRM twice (one that siblings begin with may be in the cache at once).
        whole = len(result.tree.prompt_ids) + sum(len(n.token_ids) for n in result.tree.nodes)
        assert 0 < result.usage.encoded_tokens["prm"] <= whole
    assert results[-1].usage.cached_tokens["prm"] > 0
    assert results[-1].usage.cached_tokens["policy"] > 0


def test_both_halves_from_engines_for_another_policy(engines: Engines) -> None:
    """Nodes of the HF engine, PRM and reference on vLLM; every rule of the prefix cache comes up."""
    asked: list[str] = []
    pair = VLLMImplicitPRM(engines.prm, engines.policy, beta=engines.pair.beta)
    assert pair._reference is not None
    for half in (pair.prm, pair._reference):
        begin = half.begin

        def spy(asks: Any, begin: Any = begin) -> Any:
            asked.extend(type(ask).__name__ if getattr(ask, "cached", True) else "whole" for ask in asks)
            return begin(asks)

        half.begin = spy  # type: ignore[method-assign]
    try:
        ids = engines.hf.encode(Prompt(text=LONG * 2))
        # Steps of 6 after 40 tokens: one begins where the second block of 32 ends. After 38, one reaches beyond that,
        # and the second search finds it encoded.
        options = {**OPTIONS, "steps": StepRule(delimiter=None, max_tokens=6), "strategy": Beam(width=4, expansions=2)}
        for _ in range(2):
            for result in search([ids[:40], ids[:38]], policy=engines.hf, scorer=pair, **options):
                agree(engines, result)
    finally:
        for half in (pair.prm, pair._reference):
            del half.begin  # type: ignore[method-assign]
    assert set(asked) == {"SpanRequest", "NextTokenRequest", "whole"}


def test_an_hf_pair_scores_a_vllm_policy(engines: Engines) -> None:
    pair = ImplicitPRM(engines.pair.prm, "policy", beta=engines.pair.beta, tokenizer=engines.pair.tokenizer)
    options = {**OPTIONS, "strategy": Beam(width=2, expansions=2)}
    (result,) = search(PROMPTS[:1], policy=VLLMPolicy(engines.policy), scorer=pair, **options)
    agree(engines, result)
    assert "reference" not in result.usage.encoded_tokens
    whole = ImplicitPRM(engines.pair.prm, engines.hf, beta=engines.pair.beta)
    (again,) = search(PROMPTS[:1], policy=VLLMPolicy(engines.policy), scorer=whole, **options)
    assert facts([again]) == facts([result])
    assert again.usage.encoded_tokens["reference"] > 0


def test_seeds_make_a_search_repeatable_whatever_is_beside_it(engines: Engines) -> None:
    policy = VLLMPolicy(engines.policy)
    assert policy.seeds
    options = {**OPTIONS, "strategy": Beam(width=2, expansions=3), "scorer": VLLMImplicitPRM(engines.prm, "policy")}
    together = search(PROMPTS, policy=policy, **options)
    alone = [search([prompt], policy=policy, **options)[0] for prompt in PROMPTS]
    assert facts(together) == facts(alone)
    other = search(PROMPTS, policy=policy, **{**options, "seed": 1})
    assert facts(other) != facts(together)
    assert any(len(node.children) > 1 for result in together for node in result.tree.nodes)


@pytest.mark.parametrize("tokens", [5, 40, 90])
def test_a_token_budget_holds(engines: Engines, tokens: int) -> None:
    (result,) = search(
        PROMPTS[:1], policy=VLLMPolicy(engines.policy), strategy=Beam(width=3, expansions=2), budget=tokens, **OPTIONS
    )
    assert sum(len(n.token_ids) * n.count for n in result.tree.nodes) <= tokens


def test_a_time_budget_interrupts_and_the_engine_goes_on(engines: Engines) -> None:
    now = [0.0]
    policy = VLLMPolicy(engines.policy)
    with SearchLoop(policy, clock=lambda: now[0]) as loop:
        loop.add(Prompt(text=PROMPTS[0]), SearchSettings.make(strategy=BestOfN(2), budget=Budget(seconds=1), **OPTIONS))
        for _ in range(6):
            assert not loop.step()
        now[0] = 2.0
        (result,) = loop.step()
    assert result.stopped == "seconds"
    assert result.candidates
    assert all(node.finish == "budget" and 0 < node.end <= 7 for node in result.candidates)
    assert not engines.policy.llm_engine.has_unfinished_requests()
    assert search(PROMPTS[:1], policy=policy, strategy=BestOfN(1), **OPTIONS)[0].stopped == "finished"


def test_responses_are_scored_without_a_search(engines: Engines) -> None:
    texts = ["".join(problem.steps) for problem in chains.problems(len(PROMPTS), seed=9)]
    pair = VLLMImplicitPRM(engines.prm, engines.policy, beta=engines.pair.beta)
    ours = pair.score(PROMPTS, texts, steps=RULE)
    theirs = engines.pair.score(PROMPTS, texts, steps=RULE)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token_ids == other.token_ids
        np.testing.assert_allclose(mine.token_rewards, other.token_rewards, rtol=0, atol=engines.pair.beta * 1e-3)


def test_asearch_over_an_async_engine(engines: Engines) -> None:
    """AsyncLLM as a policy, several prompts at once, a budget that interrupts; and as a scorer's engine."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run() -> None:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(pair_dir() / "policy"), **ENGINE))
        try:
            policy, scorer = AsyncVLLMPolicy(llm), VLLMImplicitPRM(engines.prm, "policy", beta=engines.pair.beta)
            options = {**OPTIONS, "strategy": Beam(width=3, expansions=2)}
            found = await asearch([*PROMPTS, LONG], policy=policy, scorer=scorer, **options)
            for result in found:
                agree(engines, result)
            # The same draws as the offline engine: a seed is of the place in the search alone.
            offline = search([*PROMPTS, LONG], policy=VLLMPolicy(engines.policy), scorer=scorer, **options)
            assert facts(found) == facts(offline)
            brief = {**options, "strategy": BestOfN(8), "budget": Budget(seconds=0.02)}
            assert {result.stopped for result in await asearch(PROMPTS, policy=policy, **brief)} == {"seconds"}

            tree = SearchTree(Prompt(token_ids=found[-1].tree.prompt_ids))
            nodes = [tree.add(tree.root, node.token_ids) for node in found[-1].tree.root.children]
            await VLLMImplicitPRM(llm, ConstantReference(0.0), beta=1.0).ascore_nodes(nodes)
            for node, sampled in zip(nodes, found[-1].tree.root.children, strict=True):
                np.testing.assert_allclose(node.rewards["prm"], sampled.logprobs, rtol=0, atol=1e-3)
        finally:
            llm.shutdown()

    asyncio.run(run())


# The last one: with its engine end vLLM's process groups, which the engines of this process share.
def test_rollouts_by_the_command_line(engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = chains.problems(2, seed=7)
    data, out = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in problems))
    words = ["rollout", "--policy", "demo", "--data", str(data), "--out", str(out), "--n", "3", "--label", "exact"]
    small = json.dumps({"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "block_size": 32})
    assert main([*words, "--max-new-tokens", "48", "--engine", "vllm", "--engine-options", small]) == 0
    assert "6 responses to 2 problems" in capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((record["problem"], record["sample"]) for record in records) == [
        (p, n) for p in (0, 1) for n in range(3)
    ]
    assert all(record["response"] == engines.hf.token_text.text(record["response_ids"]) for record in records)
