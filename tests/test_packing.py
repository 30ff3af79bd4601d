"""Packing, freezing, the sampled reference: the loss and gradients of separate rows, what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import numpy as np
import pytest
import torch
from models import tiny
from safetensors.torch import load_file
from transformers import TrainingArguments

from prm_search.cli import main
from prm_search.training.data import LabelledResponse, collate, mismatched, pairs, singles
from prm_search.training.logprobs import check_packs, freeze, response_forward, row_logprobs
from prm_search.training.packing import collate_packs, packs
from prm_search.training.recipe import OBJECTIVES, Recipe
from prm_search.training.run import train
from prm_search.training.trainer import PRMTrainer

A, B = (5, 6, 7), (8, 9)


def rows() -> list[LabelledResponse]:
    """Two prompts; responses that begin alike, that are equal, and of which one begins another."""
    given = [(A, [10, 11, 12], 1), (A, [10, 11, 13, 14], 0), (B, [10, 11], 1), (A, [10, 11], 0), (A, [10, 11, 12], 1),
             (B, [20], 0), (B, [10, 22, 23, 24, 25], 0)]  # fmt: skip
    made = [LabelledResponse(prompt, np.array(ids), bool(label)) for prompt, ids, label in given]
    for place, row in enumerate(made):
        row.reference = -np.linspace(0.5, 3, len(row.response_ids), dtype=np.float32) - place
    return made


def test_a_pack_is_the_tree_of_its_rows():
    items = singles(rows())
    first, second = packs(items, 100)
    assert first.items == [items[0], items[1], items[3], items[4]]
    assert first.tokens == [5, 6, 7, 10, 11, 12, 13, 14]
    assert first.parents == [-1, 0, 1, 2, 3, 4, 4, 6]
    assert [path.tolist() for (path,) in first.paths] == [[3, 4, 5], [3, 4, 6, 7], [3, 4], [3, 4, 5]]
    assert second.tokens == [8, 9, 10, 11, 20, 22, 23, 24, 25]
    assert second.parents == [-1, 0, 1, 2, 1, 2, 5, 6, 7]


def test_no_pack_goes_beyond_the_limit_unless_one_item_does():
    made = packs(singles(rows()), 9)
    assert [len(pack) for pack in made] == [6, 7, 6, 5, 7]
    assert [len(pack) for pack in packs(singles(rows()), 1)] == [6, 7, 5, 6, 4, 3, 7]


def test_a_batch_marks_ancestors_positions_and_what_predicts():
    batch = collate_packs(packs(singles(rows()), 100))
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 0]
    seen = batch["attention_mask"][0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen[5:8]] == [
        [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6, 7]
    ]  # fmt: skip
    assert seen[8].nonzero().flatten().tolist() == [8]  # padding
    assert batch["sources"].tolist() == [2, 3, 4, 4, 6, 10, 11, 10, 11, 14, 15, 16]
    assert batch["targets"].tolist() == [10, 11, 12, 13, 14, 10, 11, 20, 22, 23, 24, 25]
    assert batch["places"].tolist()[:9] == [0, 1, 2, 0, 1, 3, 4, 0, 1]
    assert batch["label"].tolist() == [1, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "cohere", "qwen3"])
def test_logprobs_are_those_of_separate_rows(family, attention):
    module = tiny(family, attention=attention)
    with response_forward(module):
        alone = row_logprobs(module, rows())
        for limit, batch_tokens in ((100, 100), (9, 100), (100, 1)):
            packed = row_logprobs(module, rows(), pack=limit, batch_tokens=batch_tokens)
            for ours, theirs in zip(packed, alone, strict=True):
                assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_are_those_of_separate_rows(objective, tmp_path):
    make = {"dpo": pairs, "nca": pairs, "kto": mismatched}.get(objective, singles)
    items = make(rows())
    for item in items:
        for row in item.rows:
            if row.reference is None:
                row.reference = np.full(len(row.response_ids), -2.0, np.float32)
    made = packs(items, 100)
    in_order = [item for pack in made for item in pack.items]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    results = []
    for dataset, batch in ((in_order, collate(in_order)), (made, collate_packs(made))):
        module = hf_models.llama(0).double()
        with response_forward(module):
            trainer = PRMTrainer(module, args, dataset, objective=objective, beta=0.3)
            loss = trainer.compute_loss(module, batch)
            loss.backward()
        results.append((loss.item(), {name: part.grad for name, part in module.named_parameters()}))
    (apart, gradients), (packed, of_packed) = results
    assert packed == pytest.approx(apart, abs=1e-6)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        assert (gradient - of_packed[name]).abs().max() < 1e-6, name


def test_a_model_that_packing_does_not_suit_is_refused(monkeypatch):
    module = hf_models.llama(0)
    made = packs(singles(rows()), 100)
    with response_forward(module):
        check_packs(module, made)
        plain = module.model.forward  # then one that counts positions by itself, as ALiBi does
        monkeypatch.setattr(module.model, "forward", lambda position_ids=None, **given: plain(**given))
        with pytest.raises(ValueError, match=r"pack: LlamaForCausalLM .* train without pack"):
            check_packs(module, made)
        module.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="takes no mask"):
            check_packs(module, made)


def test_windows_that_rows_exceed_are_refused():
    module = tiny("mistral-window")  # a window of 11
    long = LabelledResponse(A, np.arange(10, 30), True)
    with response_forward(module):
        check_packs(module, packs(singles(rows()), 100))
        with pytest.raises(ValueError, match="train without pack"):
            check_packs(module, packs(singles([*rows(), long]), 100))


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_frozen_are_the_embeddings_and_the_lowest_layers():
    module = hf_models.llama(0, num_hidden_layers=3, tie_word_embeddings=True)
    freeze(module, 0)
    assert all(part.requires_grad for part in module.parameters())
    freeze(module, 2)
    trained = {name for name, part in module.named_parameters() if part.requires_grad}
    assert trained == {
        name for name, _ in module.named_parameters() if "layers.2." in name or name == "model.norm.weight"
    }
    untied = hf_models.llama(0, num_hidden_layers=2, tie_word_embeddings=False)
    freeze(untied, 1)
    assert untied.lm_head.weight.requires_grad
    assert not untied.model.embed_tokens.weight.requires_grad
    gpt2 = tiny("gpt2")
    freeze(gpt2, 1)
    assert not gpt2.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize("layers", [3, 4])
def test_one_layer_at_least_is_trained(layers):
    with pytest.raises(ValueError, match=f"freeze_layers={layers}.* has 3"):
        freeze(hf_models.llama(0, num_hidden_layers=3), layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rollouts for it."""
    made = tmp_path_factory.mktemp("packing")
    hf_models.llama(0).save_pretrained(made / "model")
    hf_models.tokenizer().save_pretrained(made / "model")
    lines = [
        json.dumps({"prompt_ids": [9 + problem, 40], "response_ids": [50, 60 + k % 3, 70 + problem, 1], "label": k % 2})
        for problem in range(8)
        for k in range(4)
    ]
    (made / "rollouts.jsonl").write_text("\n".join(lines))
    return made


def trained(folder: Path, out: Path, **given: object) -> tuple[dict, dict[str, torch.Tensor], list[str]]:
    recipe = Recipe(learning_rate=1e-2, batch=2, micro_batch=2, holdout=0.3, **given)
    said: list[str] = []
    card = train(str(folder / "model"), folder / "rollouts.jsonl", out, recipe, log=said.append)
    return card, load_file(out / ("model.safetensors" if recipe.lora is None else "adapter_model.safetensors")), said


def test_a_packed_run_says_what_it_saves_and_trains(folder, tmp_path):
    card, weights, said = trained(folder, tmp_path / "out", pack=True, freeze_layers=1, epochs=2)
    problems = card["data"]["problems"]
    assert f"packed {problems * 4 * 6} tokens into {problems * 12}, {problems} problems" in said
    assert card["metrics"]["steps"] == 2 * -(-problems // 2)
    assert card["recipe"]["pack"] is True
    assert card["recipe"]["freeze_layers"] == 1
    assert 0 <= card["metrics"]["held_out_pair_accuracy"] <= 1
    start = load_file(folder / "model" / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], weights[name])}
    assert changed == {name for name in start if "layers.1." in name or name in ("model.norm.weight", "lm_head.weight")}


def test_an_adapter_of_a_frozen_layer_stays_without_effect(folder, tmp_path):
    _, weights, _ = trained(folder, tmp_path / "out", lora=2, freeze_layers=1)
    moved = {name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 0}
    assert moved
    assert moved == {name for name in weights if "lora_B" in name and "layers.1." in name}


@pytest.mark.parametrize("given", [{"freeze_layers": -1}, {"freeze_layers": 1.5}, {"freeze_layers": True}])
def test_bad_numbers_of_layers_are_named(given):
    with pytest.raises(ValueError, match="freeze_layers"):
        Recipe(**given)


# -- the reference that sampled ----------------------------------------------------------------------------------------


@pytest.fixture
def sampled(folder: Path, tmp_path: Path) -> list[dict]:
    """Rollouts of the model itself, as records."""
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"question": str(k), "answer": "1"}) + "\n" for k in range(6))
    )
    status = main(
        ["rollout", "--policy", str(folder / "model"), "--data", str(tmp_path / "problems.jsonl"), "--n", "3",
         "--temperature", "0.7", "--top-k", "20", "--max-new-tokens", "6", "--label", "exact", "--out",
         str(tmp_path / "sampled.jsonl")]
    )  # fmt: skip
    assert status == 0
    records = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()]
    for record in records:
        record["label"] = record["sample"] % 2
    return records


def train_on(
    folder: Path, records: list[dict], out: Path, **given: object
) -> tuple[list[str], dict[str, torch.Tensor]]:
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    said: list[str] = []
    recipe = Recipe(learning_rate=1e-3, batch=4, micro_batch=4, holdout=0.2, **given)
    train(str(folder / "model"), file, out, recipe, log=said.append)
    return said, load_file(out / "model.safetensors")


def test_the_policys_log_probabilities_are_the_reference(folder, sampled, tmp_path):
    for record in sampled:
        assert len(record["logprobs"]) == len(record["response_ids"])
    said, weights = train_on(folder, sampled, tmp_path / "read", sampled_reference=True)
    assert not any("reference" in line for line in said)
    computed, others = train_on(folder, sampled, tmp_path / "computed")
    assert any("computed" in line for line in computed)
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], atol=1e-3), name


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda record: record.pop("logprobs"), "18 of 18 rollouts have no logprobs"),
     (lambda record: record.update(logprobs=[each - 1 for each in record["logprobs"]]), "differ from the model's by 1"),
     (lambda record: record.update(logprobs=record["logprobs"][1:]), "a finite number <= 0 a response id")],
)  # fmt: skip
def test_log_probabilities_of_another_model_or_none_are_refused(folder, sampled, tmp_path, change, said):
    for record in sampled:
        change(record)
    with pytest.raises(ValueError, match=said):
        train_on(folder, sampled, tmp_path / "out", sampled_reference=True)
