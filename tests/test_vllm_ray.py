"""`--engine vllm` in the workers of a cluster: an engine in each of two, and the pair beside it. On a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray")

import torch
from pairs import byte_tokenizer, llama
from records import lines, write

pytestmark = pytest.mark.vllm

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
OPTIONS = (
    '{"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "block_size": 32, "kv_cache_memory_bytes": 33554432}'
)


def test_two_workers_with_an_engine_each(
    workdir: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("policy", 1), ("prm", 2)):
        llama(seed, **SHAPE).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    questions = [f"sum {i}" for i in range(4)]
    write("data.jsonl", [{"question": question, "answer": "b"} for question in questions])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process a worker, for the time that starting takes
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    status, _, error = run(
        "eval", "--policy", "policy", "--prm", "prm", "--reference", "policy", "--engine", "vllm", "--engine-options",
        OPTIONS, "--data", "data.jsonl", "--label", "exact", "--max-new-tokens", "6", "--budgets", "2",
        "--strategies", "greedy,best_of_n,beam", "--step-tokens", "3", "--batch", "1", "--out", "out", "--ray",
        "--workers", "2", "--gpus-per-worker", "0",
    )  # fmt: skip
    assert status == 0, error
    assert "died" not in error
    records = lines("out/records.jsonl")
    assert [record["index"] for record in records] == list(range(12))
    assert {kind: sum(record["kind"] == kind for record in records) for kind in ("greedy", "samples", "search")} == {
        "greedy": 4, "samples": 4, "search": 4
    }  # fmt: skip
    assert all(record["prm_tokens"] > 0 for record in records if record["kind"] == "search")
    policy, tokenizer = llama(1, **SHAPE), byte_tokenizer()
    for record in (record for record in records if record["kind"] == "greedy"):
        ids = start = tokenizer(questions[record["problem"]])["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                best, next_best = policy(torch.tensor([ids])).logits[0, -1].topk(2).values
                ids = [*ids, int(policy(torch.tensor([ids])).logits[0, -1].argmax())]
            assert best - next_best > 0.05  # no tie that the last bits of fp32 could break otherwise
        assert record["response"] == tokenizer.decode(ids[len(start) :])
