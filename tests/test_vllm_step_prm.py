"""VLLMStepPRM over real vLLM engines on a CPU: scores of the HF engine, and what the prefix cache saves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vllm reads it
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from prm_models import QUESTION, prm_tokenizer, publish
from servers import Served

from prm_search import HFPolicy, Judge, JudgeFormat
from prm_search.integrations.vllm import VLLMPolicy, VLLMServer, VLLMStepPRM
from prm_search.scorers.explicit.judge_formats import grades
from prm_search.scorers.explicit.step_prm import StepPRM
from prm_search.tree import Prompt, SearchTree

pytestmark = pytest.mark.vllm

# vLLM's CPU attention wants heads of 32.
SIZES = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 512}
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
}
PATHS = [
    ["2 plus 3 is 5.", "5 times 4 is 20.", "So it is \\boxed{20}."],
    ["2 plus 3 is 5.", "5 times 4 is 25."],
    ["2 plus 3 is 6, {sic}.", "6 times 4 is 24.", "Done.", "Really."],
]


def plant() -> SearchTree:
    """A tree of these answers, common steps once."""
    tree = SearchTree(Prompt(text=QUESTION))
    nodes = {(): tree.root}
    for steps in PATHS:
        for i in range(1, len(steps) + 1):
            key = tuple(steps[:i])
            if key not in nodes:
                nodes[key] = tree.add(nodes[key[:-1]], [7], text=steps[i - 1] + "\n\n")
    return tree


# Formats whose models one engine runs: the first is what it is published as.
ENGINES = {
    "rlhflow": ["rlhflow", "granite", "math_shepherd"],  # words: one token is drawn
    "qwen_math": ["qwen_math"],  # vLLM's own class, all tokens pooled
    "pure": ["pure", "trl"],  # a classifier with a bias, the last token pooled
    "universal": ["universal"],
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, str]]:
    folder = publish(tmp_path_factory.mktemp("prm") / request.param, request.param, SIZES)
    prm = VLLMStepPRM.from_pretrained(folder, format=request.param, **ENGINE)
    yield prm._given, folder, request.param
    prm._given.llm_engine.engine_core.shutdown()


def test_scores_are_those_of_the_hf_engine_and_the_cache_is_read(engine: tuple[Any, Path, str]) -> None:
    llm, folder, published = engine
    for format in ENGINES[published]:
        prm = VLLMStepPRM(llm, format=format)
        own = StepPRM.from_pretrained(folder, format=format, dtype="float32")
        tree, twin = plant(), plant()
        for depth in range(1, 5):
            prm.score_nodes([node for node in tree.nodes if node.depth == depth])
        own.score_nodes(twin.nodes[1:])
        expected = [node.reward for node in twin.nodes[1:]]
        assert [node.reward for node in tree.nodes[1:]] == pytest.approx(expected, abs=1e-3)
        counts, paths = tree.meter.counts, [prm._tree(tree).of(node).ids for node in tree.nodes[1:]]
        assert counts["cached", prm.prm.id] > 0
        # Each distinct beginning once; beside it the tails of blocks, again.
        assert counts["encoded", prm.prm.id] == len({ids[:end] for ids in paths for end in range(1, len(ids) + 1)})
        sent = sum(counts[kind, prm.prm.id] for kind in ("encoded", "reencoded", "cached"))
        assert sent == sum(map(len, paths))
        prm.release(tree)


def test_the_other_kind_of_engine_is_refused(engine: tuple[Any, Path, str]) -> None:
    llm, _, published = engine
    other = "qwen_math" if published == "rlhflow" else "rlhflow"
    with pytest.raises(ValueError, match=f"format='{other}': an engine that (generates|pools) "):
        VLLMStepPRM(llm, format=other)
    if published == "pure":
        prm = VLLMStepPRM(llm, format="universal")
        with pytest.raises(ValueError, match="gives 2 numbers for a token, where this format needs 1"):
            prm.score_nodes(plant().nodes[1:])


@pytest.mark.parametrize("engine", ["rlhflow"], indirect=True)
@pytest.mark.parametrize("per", ["step", "answer"])
def test_a_judges_verdicts_are_those_of_the_hf_engine(engine: tuple[Any, Path, str], per: Any) -> None:
    llm, folder, _ = engine
    asked = "{question}\n{steps}\nIs the last step right?" if per == "step" else "{question}\n{answer}\nIs it right?"
    format = JudgeFormat(asked, grades(("a", "b", "c", "d", "e")), per=per)
    judges = [
        Judge(policy, format=format) for policy in (VLLMPolicy(llm), HFPolicy.from_pretrained(folder, dtype="float32"))
    ]
    scored = []
    for judge in judges:
        tree = plant()
        for leaf in tree.nodes[1:]:
            if not leaf.children:
                leaf.finish = "stop"
        for depth in range(1, 5):
            judge.score_nodes([node for node in tree.nodes if node.depth == depth])
        scored.append([node.reward_of("judge") for node in tree.nodes[1:]])
        if judge is judges[0]:
            assert tree.meter.counts["cached", judge.policy.id] > 0  # what questions begin with in common
        judge.release(tree)
    on_vllm, on_hf = scored
    assert on_vllm == pytest.approx(on_hf, abs=1e-4)
    judged = [score for score in on_hf if score]
    assert max(judged) - min(judged) > 1e-2  # they tell steps apart


def test_a_pooling_server_encodes_each_path_whole(tmp_path: Path) -> None:
    pytest.importorskip("httpx")
    folder = publish(tmp_path / "prm", "qwen_math", SIZES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--model", str(folder), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    words += ["--runner", "pooling", "--enforce-eager", "--max-num-seqs", "32"]
    # Pooling of steps, vLLM's own choice; of the published models it knows the marker.
    words += ["--pooler-config", json.dumps({"step_tag_id": prm_tokenizer().convert_tokens_to_ids("<extra_0>")})]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    served = Served(port)
    try:
        while not answers(served):
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        behind = VLLMServer(f"http://127.0.0.1:{port}")
        own = StepPRM.from_pretrained(folder, format="qwen_math", dtype="float32")
        prm = VLLMStepPRM(behind, own.tokenizer, format="qwen_math")
        tree, twin = plant(), plant()
        prm.score_nodes(tree.nodes[1:])
        own.score_nodes(twin.nodes[1:])
        expected = [node.reward for node in twin.nodes[1:]]
        assert [node.reward for node in tree.nodes[1:]] == pytest.approx(expected, abs=1e-3)
        counts, paths = tree.meter.counts, [prm._tree(tree).of(node).ids for node in tree.nodes[1:]]
        assert counts["cached", behind.id] == 0
        assert counts["encoded", behind.id] + counts["reencoded", behind.id] == sum(map(len, paths))
        assert counts["reencoded", behind.id] > counts["encoded", behind.id]
        behind.close()
    finally:
        process.kill()
        process.wait()


def answers(served: Served) -> bool:
    try:
        return served.send("/health", method="GET")[0] == 200
    except OSError:
        return False
