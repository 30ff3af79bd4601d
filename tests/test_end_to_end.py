"""rollout, train and eval in a row, by their commands, on a problem file: the pair that comes out is worth having."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prm_search.cli import main
from prm_search.demo.chains import problems

ANSWER = ["--label", "exact", "--answer", "prm_search.demo.chains:answer"]


def write(path: str, asked: list) -> None:
    Path(path).write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in asked))


def test_rollout_train_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a minute of training: best-of-16 and the beam by the new PRM beat majority on held-out, longer problems."""
    monkeypatch.chdir(tmp_path)
    write("train.jsonl", [p for length, n in ((2, 150), (3, 250)) for p in problems(n, split="prm", length=length)])
    write("test.jsonl", problems(80, split="test", seed=77, length=6))
    policy = ["--policy", "demo"]
    assert main(["rollout", *policy, "--data", "train.jsonl", "--n", "4", *ANSWER, "--out", "rollouts.jsonl"]) == 0
    status = main(
        ["train", "--model", "demo", "--rollouts", "rollouts.jsonl", "--out", "prm", "--lr", "1e-3", "--epochs", "4",
         "--micro-batch", "64", "--delimiter", ";"]
    )  # fmt: skip
    assert status == 0
    assert json.loads(Path("prm/pair.json").read_text())["metrics"]["held_out_pair_accuracy"] > 0.6
    status = main(
        ["eval", *policy, "--pair", "prm", "--data", "test.jsonl", *ANSWER, "--out", "table", "--budgets", "16",
         "--strategies", "majority,best_of_n,beam"]
    )  # fmt: skip
    assert status == 0
    assert Path("table/report.md").is_file()
    rows = {row["strategy"]: row for row in json.loads(Path("table/report.json").read_text())["rows"]}
    assert rows["majority"]["problems"] == 80
    assert rows["beam"]["policy_tokens"] <= rows["majority"]["policy_tokens"]
    for name in ("best_of_n", "beam"):
        assert rows[name]["accuracy"] > rows["majority"]["accuracy"]
        assert rows[name]["against_majority"]["p"] < 0.05
