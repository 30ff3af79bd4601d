"""Training by several processes under `accelerate launch`: the loss curve of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import PROGRAM
from records import lines, write

from prm_search.demo import pair_dir
from prm_search.training.recipe import Recipe
from prm_search.training.run import train

accelerate = pytest.importorskip("accelerate")

ARGUMENTS: dict[str, Any] = {"logging_steps": 1, "max_grad_norm": 1.0}
# gloo on 127.0.0.1, at a port that the system chooses. --multi_gpu is accelerate's word for torchrun, GPUs or not.
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--main_process_ip", "127.0.0.1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip


def made_up() -> list[dict[str, Any]]:
    """40 labelled responses of random tokens to 10 prompts."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(10):
        prompt_ids = rng.integers(5, 20, 4).tolist()
        for sample in range(4):
            response_ids = [*rng.integers(5, 20, int(rng.integers(3, 12))).tolist(), 2]
            rows.append({"prompt_ids": prompt_ids, "response_ids": response_ids, "label": (prompt + sample) % 2})
    return [{"index": index, **row} for index, row in enumerate(rows)]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in lines(folder / "log.jsonl")]


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    policy = str(pair_dir() / "policy")
    write(tmp_path / "rollouts.jsonl", made_up())
    (tmp_path / "arguments.json").write_text(json.dumps(ARGUMENTS))
    recipe = Recipe(learning_rate=3e-3, batch=8, micro_batch=2, epochs=2, holdout=0.0)
    train(policy, tmp_path / "rollouts.jsonl", tmp_path / "one", recipe, arguments=ARGUMENTS)
    command = [
        *LAUNCH, PROGRAM, "train", "--model", policy, "--rollouts", tmp_path / "rollouts.jsonl",
        "--out", tmp_path / "two", "--lr", "3e-3", "--batch", "8", "--micro-batch", "2", "--epochs", "2",
        "--holdout", "0", "--arguments", tmp_path / "arguments.json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 10
    assert max(one) - min(one) > 0.01  # it learns
    assert np.abs(np.array(one) - two).max() < 1e-4
    cards = [json.loads((tmp_path / name / "pair.json").read_text()) for name in ("one", "two")]
    assert [card["metrics"]["processes"] for card in cards] == [1, 2]
