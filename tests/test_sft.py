"""examples/grade_school/sft.py: what is learnt from, what a finished run leaves, going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import torch

pytest.importorskip("accelerate")

import sft
from transformers import AutoModelForCausalLM
from words import problems

import prm_search as ps
from prm_search.cli import main

TOLD = problems(24, split="policy", max_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 24 worked problems."""
    made = tmp_path_factory.mktemp("sft")
    hf_models.llama(0, initializer_range=0.02).save_pretrained(made / "model")
    hf_models.tokenizer().save_pretrained(made / "model")
    (made / "data.jsonl").write_text("".join(json.dumps(problem.record("x")) + "\n" for problem in TOLD))
    return made


def tune(folder: Path, out: Path) -> None:
    sft.main(
        ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--out", str(out), "--lr", "1e-2",
         "--batch", "4", "--save-steps", "2"]
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    tune(folder, folder / "tuned")
    return folder / "tuned"


def test_the_loss_is_of_the_worked_answer_and_the_end_after_the_prompt_of_rollouts(folder):
    policy = ps.HFPolicy.from_pretrained(folder / "model")
    rows = sft.rows(folder / "data.jsonl", policy.tokenizer)
    assert len(rows) == len(TOLD)
    for row, problem in zip(rows, TOLD, strict=True):
        prompt = policy.encode(ps.Prompt(text=problem.question + "\n"))
        assert row["input_ids"][: len(prompt)] == list(prompt)
        assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
        assert policy.tokenizer.decode(row["input_ids"][len(prompt) : -1]) == problem.worked
        assert row["labels"][-1] == hf_models.EOS


def test_it_learns_and_leaves_a_policy_for_rollout_and_train(tuned, tmp_path):
    losses = [
        each["loss"] for each in map(json.loads, (tuned / "log.jsonl").read_text().splitlines()) if "loss" in each
    ]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    (tmp_path / "test.jsonl").write_text(json.dumps(problems(1)[0].record("y")) + "\n")
    rollouts = tmp_path / "rollouts.jsonl"
    status = main(
        ["rollout", "--policy", str(tuned), "--data", str(tmp_path / "test.jsonl"), "--template", r"{}\n", "--n", "2",
         "--label", "exact", "--answer", "####", "--max-new-tokens", "8", "--out", str(rollouts)]
    )  # fmt: skip
    assert status == 0
    status = main(
        ["train", "--model", str(tuned), "--rollouts", str(rollouts), "--lora", "2", "--holdout", "0", "--batch", "2",
         "--delimiter", r"\n", "--out", str(tmp_path / "prm")]
    )  # fmt: skip
    assert status == 0
    pair = ps.ImplicitPRM.from_pretrained(tmp_path / "prm")
    assert pair.score(["a?\n"], ["x: 1+1=2\n#### 2"])[0].token_rewards.shape[0] > 0


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(folder, tuned, tmp_path, monkeypatch):
    class Stopped(sft.Trainer):
        def _save_checkpoint(self, *given):
            super()._save_checkpoint(*given)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sft, "Trainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            tune(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tune(folder, tmp_path / "out")
    resumed, straight, start = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (tmp_path / "out", tuned, folder / "model")
    )
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert not any(torch.equal(start[name], straight[name]) for name in straight)
