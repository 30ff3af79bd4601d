"""A pair behind a real vLLM server, by its token-in/token-out route."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("httpx")

import httpx
from prm_search.integrations.vllm import VLLMImplicitPRM, VLLMServer

from prm_search.demo import chains, pair_dir
from prm_search.implicit_prm import ImplicitPRM
from prm_search.policy import HFPolicy
from prm_search.search import search
from prm_search.steps import StepRule
from prm_search.strategies import Beam
from prm_search.tree import Prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the PRM that ships."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log: Path = tmp_path_factory.mktemp("vllm") / "log"
    words = f"""-P -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager
        --max-num-seqs 16 --block-size 32 --kv-cache-memory-bytes {64 << 20} --enable-scale-out
        --enable-prompt-tokens-details --model""".split()
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, *words, str(pair_dir() / "prm")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
            cwd=log.parent,  # nothing of a checkout on its path
        )
        try:
            for _ in range(600):
                if server.poll() is not None:
                    pytest.fail(log.read_text()[-3000:])
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def test_step_rewards_are_those_of_the_hf_engine(url: str) -> None:
    policy = HFPolicy.from_pretrained(pair_dir() / "policy", dtype="float32")
    exact = ImplicitPRM.from_pretrained(pair_dir(), dtype="float32", name="exact")
    server = VLLMServer(url)
    pair = VLLMImplicitPRM(server, "policy", beta=exact.beta)
    text = "".join(problem.prompt for problem in chains.problems(4, seed=8))
    ids = policy.encode(Prompt(text=text))
    # As in test_vllm_search.py: a step that begins with a block, and one that reaches beyond its end and comes twice.
    options: dict[str, Any] = {
        "steps": StepRule(delimiter=None, max_tokens=6),
        "max_new_tokens": 48,
        "temperature": 1.0,
        "strategy": Beam(width=4, expansions=2),
    }
    for _ in range(2):
        for result in search([ids[:40], ids[:38]], policy=policy, scorer=pair, prover=exact, value="q", **options):
            for node in result.tree.nodes[1:]:
                np.testing.assert_allclose(node.rewards["prm"], node.rewards["exact"], rtol=0, atol=exact.beta * 1e-3)
            assert result.usage.cached_tokens["prm"] > 0
    assert server.context == 127
    server.close()


def test_a_server_without_the_route_or_the_model_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="serves"):
        VLLMServer(url, model="another")
