"""--engine of rollout and generate. The run under vLLM itself is in test_vllm_search.py."""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prm_search.integrations.vllm.load as vllm_loading
from prm_search.cli import main
from prm_search.commands.models import load_policy

PROMPT = "=5a*7b+3?"
GENERATE = ["generate", "--policy", "demo", "--pair", "demo", "--prompt", PROMPT, "--max-new-tokens", "30", "--json"]


def rollout(folder: Path) -> list[str]:
    data = folder / "problems.jsonl"
    data.write_text(json.dumps({"question": PROMPT, "answer": "3"}) + "\n")
    out = str(folder / "out.jsonl")
    return ["rollout", "--policy", "demo", "--data", str(data), "--out", out, "--n", "2", "--label", "exact"]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What would have been loaded under vLLM; the HF engine stands in for it."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return load_policy("demo")

    monkeypatch.setattr(vllm_loading, "load_policy", load)
    return asked


def test_rollout_and_generate_take_the_engine_and_its_options(
    loaded: list[tuple[str, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["--engine", "vllm", "--dtype", "float32", "--engine-options", '{"max_num_seqs": 4}']
    assert main([*rollout(tmp_path), *engine]) == 0
    assert main([*GENERATE, *engine]) == 0
    assert [Path(name).name for name, _ in loaded] == ["policy", "policy"]
    assert [options for _, options in loaded] == [{"dtype": "float32", "max_num_seqs": 4}] * 2
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_a_file_of_one_engine_is_not_gone_on_with_by_another(
    loaded: list[tuple[str, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(rollout(tmp_path)) == 0
    capsys.readouterr()
    assert main([*rollout(tmp_path), "--engine", "vllm", "--resume"]) == 2
    assert "out.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("command", [lambda folder: GENERATE, rollout], ids=["generate", "rollout"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "trt"], "--engine 'trt' is unknown; it is one of hf, vllm"),
        (["--engine-options", "{}"], "--engine-options needs --engine vllm"),
        (["--engine", "vllm", "--engine-options", "{"], "is no JSON"),
        (["--engine", "vllm", "--engine-options", "[1]"], "a JSON object is needed"),
        (["--engine", "vllm", "--device", "cuda:1"], "leave it out with --engine vllm"),
        (["--engine", "vllm", "--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["--engine", "vllm"], "vLLM is not installed (pip install 'prm-search[vllm]'"),
    ],
)
def test_bad_input_is_one_line(
    command: Callable[[Path], list[str]],
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without_vllm(name: str, *rest: Any, **more: Any) -> Any:
        if name == "vllm" or name.startswith("vllm."):
            raise ImportError("No module named 'vllm'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_vllm)
    assert main([*command(tmp_path), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "finished" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("prm-search: ")
    assert said in lines[0]


@pytest.mark.parametrize("actor", [None, "an actor"])
def test_engines_in_ray_workers_of_one_machine_do_not_bind_the_same_cores(
    monkeypatch: pytest.MonkeyPatch, actor: str | None
) -> None:
    bound: list[str | None] = []
    cpu = SimpleNamespace(is_cpu=lambda: True)
    made = SimpleNamespace(LLM=lambda name, **options: bound.append(os.environ.get("VLLM_CPU_OMP_THREADS_BIND")))
    ray = SimpleNamespace(
        is_initialized=lambda: True, get_runtime_context=lambda: SimpleNamespace(get_actor_id=lambda: actor)
    )
    for name, module in (("ray", ray), ("vllm", made), ("vllm.platforms", SimpleNamespace(current_platform=cpu))):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    for said in (None, "0-3"):
        if said is None:
            monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
        else:
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", said)
        vllm_loading.load_llm("tiny")
    assert bound == ["nobind" if actor else None, "0-3"]
