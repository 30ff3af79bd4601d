"""Fine-tuning of a policy: what is learnt from, the loss, going on after a stop, LoRA, the recipes in the examples."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import hf_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prm_search as ps
from prm_search.cli import main
from prm_search.commands import BadInput
from prm_search.demo import sft
from prm_search.demo.sft import SFTRecipe, train
from prm_search.demo.sft_trainer import ResponseTrainer
from prm_search.demo.words import problems
from prm_search.training.data import Item, LabelledResponse, collate
from prm_search.training.logprobs import response_forward

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "grade_school"
TOLD = problems(24, split="policy", max_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 24 worked problems."""
    made = tmp_path_factory.mktemp("sft")
    hf_models.llama(0, initializer_range=0.02).save_pretrained(made / "model")
    hf_models.tokenizer().save_pretrained(made / "model")
    (made / "data.jsonl").write_text("".join(json.dumps(problem.record("x")) + "\n" for problem in TOLD))
    return made


def recipe(folder: Path, out: Path, **given: object) -> SFTRecipe:
    few = {"learning_rate": 1e-2, "batch": 4, "micro_batch": 2, "save_steps": 2, "arguments": {"logging_steps": 1}}
    return replace(SFTRecipe(str(folder / "model"), str(folder / "data.jsonl"), str(out), **few), **given)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    train(recipe(folder, folder / "tuned"))
    return folder / "tuned"


def test_it_learns_and_leaves_a_policy(folder, tuned, tmp_path):
    note = json.loads((tuned / "sft.json").read_text())
    losses = [each["loss"] for each in note["log"] if "loss" in each]
    assert len(losses) == note["steps"] == 6
    assert losses[-1] < losses[0] - 0.5
    assert not (tuned / "checkpoints").exists()
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


def test_it_learns_the_worked_answer_and_the_end_after_the_prompt_of_rollouts(folder):
    policy = ps.HFPolicy.from_pretrained(folder / "model")
    items = sft._items(recipe(folder, folder / "none"), policy)
    assert len(items) == len(TOLD)
    for item, problem in zip(items, TOLD, strict=True):
        (row,) = item.rows
        assert list(row.prompt_ids) == policy.tokenizer(problem.question + "\n")["input_ids"]
        assert policy.tokenizer.decode(row.response_ids[:-1]) == problem.worked
        assert row.response_ids[-1] == hf_models.EOS


def test_the_loss_is_of_response_tokens(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rows = [LabelledResponse((5, 6, 7), [8, 9], True), LabelledResponse((5,), [9, 9, 4, 1], True)]
    with torch.no_grad():
        naive = [
            model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0].log_softmax(-1)[place - 1, token]
            for row in rows
            for place, token in enumerate(row.response_ids.tolist(), start=len(row.prompt_ids))
        ]
    batch = collate([Item((row,), True) for row in rows])
    args = sft._arguments(recipe(folder, tmp_path))
    with response_forward(model):
        loss = ResponseTrainer(model, args, [Item((row,), True) for row in rows]).compute_loss(model, batch)
    assert torch.allclose(loss, -torch.stack(naive).mean(), atol=1e-5)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(folder, tuned, tmp_path, lora):
    given = recipe(folder, tmp_path / "out", lora=lora)

    def stop(line: str) -> None:
        if line.startswith("step 5 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(given, log=stop)
    assert not (tmp_path / "out" / "sft.json").exists()
    with pytest.raises(ValueError, match="resume goes on"):
        train(given)
    with pytest.raises(ValueError, match="other data or settings"):
        train(replace(given, learning_rate=1e-3), resume=True)
    said: list[str] = []
    train(given, resume=True, log=said.append)
    assert [line.split()[1] for line in said] == ["5", "6"]
    if lora is None:
        whole = tuned
    else:
        whole = tmp_path / "whole"
        train(replace(given, out=str(whole)))
    logs = [json.loads((Path(path) / "sft.json").read_text())["log"] for path in (tmp_path / "out", whole)]
    assert logs[0] == logs[1]
    assert {"loss", "step"} <= set(logs[0][-1])
    resumed, straight, start = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "out", whole, folder / "model")
    )
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    changed = {name for name in start if not torch.equal(start[name], straight[name])}
    assert changed == (set(start) if lora is None else {name for name in start if "_proj" in name})
    assert not list((tmp_path / "out").glob("adapter*"))  # merged
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == hf_models.EOS
    with pytest.raises(BadInput, match="holds a policy already"):
        train(given, resume=True)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("sft*.json")), ids=lambda file: file.name)
def test_the_examples_are_recipes(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    read = SFTRecipe.read(file, data="other.jsonl")
    assert read.data == "other.jsonl"
    assert read.template == "{}\n"
    args = sft._arguments(read)
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == read.batch


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"modle": "x"}, "'modle' is unknown"), ({"lora": 0}, "lora=0"), ({"batch": 1.5}, "batch=1.5"),
     ({"learning_rate": "fast"}, "learning_rate='fast'"), ({"epochs": 0}, "epochs=0"), ({"data": ""}, "data=''"),
     ({"arguments": []}, r"arguments=\[\]"), ({"template": "Q:"}, "needs {} once"), ({"batch": 3}, "batch=3"),
     ({"data": "none.jsonl"}, "none.jsonl cannot be read"), ({"model": "./none"}, "none"),
     ({"arguments": {"warmpu": 1}}, "'warmpu'")],
)  # fmt: skip
def test_bad_recipes_are_named_in_one_line(folder, tmp_path, capsys, fields, said):
    good = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "out": str(tmp_path / "out")}
    (tmp_path / "sft.json").write_text(json.dumps({**good, "micro_batch": 2, "batch": 4, **fields}))
    with pytest.raises(SystemExit, match="2"):
        sft.main(["--config", str(tmp_path / "sft.json")])
    assert re.search(said, capsys.readouterr().err)


def test_a_recipe_has_to_be_an_object_with_a_model(tmp_path):
    file = tmp_path / "sft.json"
    file.write_text("[]")
    with pytest.raises(BadInput, match="object"):
        SFTRecipe.read(file)
    file.write_text('{"data": "d", "out": "o"}')
    with pytest.raises(BadInput, match="'model' is missing"):
        SFTRecipe.read(file)
    file.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        SFTRecipe.read(file)


def test_an_adapter_is_refused(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadInput, match="merge it"):
        train(recipe(folder, tmp_path / "out", model=str(tmp_path / "adapter")))
