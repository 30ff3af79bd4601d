"""Training: log-probabilities with gradients, the reference filed once, objectives, LoRA, kill and resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, naive_logprobs, tiny
from processes import held
from records import lines, write
from safetensors.torch import load_file

import prm_search as ps
from prm_search.cli import main
from prm_search.commands.models import load_policy
from prm_search.demo import pair_dir
from prm_search.demo.chains import problems
from prm_search.scorers.implicit import card as pair_card
from prm_search.training.data import LabelledResponse, collate, read_rollouts, singles
from prm_search.training.logprobs import add_reference, response_forward, row_logprobs, without_dropout
from prm_search.training.pair_accuracy import pair_accuracy
from prm_search.training.recipe import BETA, OBJECTIVES, Recipe
from prm_search.training.run import train

POLICY = str(pair_dir() / "policy")
QUICK = {"learning_rate": 1e-3, "micro_batch": 32, "batch": 32, "holdout": 0.25}
SMALL = QUICK | {"problems": 80}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 labelled responses to short chains."""
    folder = tmp_path_factory.mktemp("rollouts")
    asked = [p for length, n in ((2, 100), (3, 150)) for p in problems(n, split="prm", length=length)]
    write(folder / "problems.jsonl", [{"question": p.prompt, "answer": p.answer} for p in asked])
    status = main(
        ["rollout", "--policy", "demo", "--data", str(folder / "problems.jsonl"), "--n", "4", "--label", "exact",
         "--out", str(folder / "rollouts.jsonl")]
    )  # fmt: skip
    assert status == 0
    return folder / "rollouts.jsonl"


def told_apart(pair: ps.ImplicitPRM, rollouts: Path) -> float | None:
    """Pair accuracy on rollouts, most of which were trained on."""
    rows = read_rollouts(rollouts)[300:700]
    scores = pair.score([r.prompt_ids for r in rows], [r.response_ids.tolist() for r in rows])
    return pair_accuracy(rows, [each.reward for each in scores])


def some_rows(vocabulary: int = 96) -> list[LabelledResponse]:
    rng = np.random.default_rng(0)
    sizes = [(5, 3), (1, 7), (9, 1), (4, 4)]
    return [
        LabelledResponse(tuple(rng.integers(3, vocabulary, p).tolist()), rng.integers(3, vocabulary, r), bool(i % 2))
        for i, (p, r) in enumerate(sizes)
    ]


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite", "cohere", "hyperclovax", "gpt-neox"])
def test_logprobs_are_those_of_a_plain_forward(family):
    module = tiny(family)
    rows = some_rows()
    plain = [naive_logprobs(module, [*r.prompt_ids, *r.response_ids.tolist()])[len(r.prompt_ids) :] for r in rows]
    with response_forward(module):
        found = row_logprobs(module, rows)
        one_by_one = row_logprobs(module, rows, batch_tokens=1)
    for ours, alone, theirs in zip(found, one_by_one, plain, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4
        assert np.abs(alone - theirs).max() < 1e-4


def test_gradients_are_those_of_a_plain_forward():
    module = tiny("llama")
    batch = collate(singles(some_rows()))
    mask = batch["response_mask"]
    scale = torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(0))

    table = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    plain = table[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    (plain[mask] * scale).sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    with response_forward(module):
        ours = module(batch["input_ids"], batch["attention_mask"], mask)
        (ours[mask] * scale).sum().backward()
    assert ours[~mask].abs().max() == 0
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-4, rtol=1e-4), name


def test_no_table_of_tokens_by_vocabulary_is_kept():
    """What autograd saves for the backward pass holds nothing of the size of the logits."""
    module = tiny("llama")
    batch = collate(singles(some_rows()))
    shapes: list[torch.Size] = []

    def note(saved: torch.Tensor) -> torch.Tensor:
        shapes.append(saved.shape)
        return saved

    with response_forward(module), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        module(batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    assert shapes
    assert all(shape[-1] != 96 for shape in shapes if len(shape))


def test_autocast_narrows_the_heads_operands_and_no_sum(monkeypatch):
    """Under --bf16 the head's product is as any other layer's, with fp32 sums. Gradients reach the fp32 weights."""
    from prm_search.engine import head

    seen = []

    def watched(hidden, weight, *others, **options):
        seen.append((hidden.dtype, weight.dtype))
        return linear_logprob(hidden, weight, *others, **options)

    linear_logprob = head.linear_logprob
    monkeypatch.setattr(head, "linear_logprob", watched)
    module = tiny("llama")
    batch = collate(singles(some_rows()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "response_mask")}
    weight = module.get_output_embeddings().weight
    results = {}
    for narrow in (False, True):
        module.zero_grad()
        with response_forward(module), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            found = module(**inputs)
        found.sum().backward()
        results[narrow] = found.detach(), weight.grad.clone()
        assert found.dtype == weight.grad.dtype == torch.float32
    narrow = (torch.bfloat16, torch.bfloat16)
    assert seen.count(narrow) == 1
    assert seen[-1] == narrow
    plain, mixed = results[False], results[True]
    assert 0 < (plain[0] - mixed[0]).abs().max() < 0.5
    assert torch.nn.functional.cosine_similarity(plain[1].flatten(), mixed[1].flatten(), dim=0) > 0.99


def test_forward_is_given_back():
    module = tiny("llama")
    ids = torch.tensor([[4, 5, 6]])
    before = module(ids).logits
    with pytest.raises(RuntimeError, match="inside"), response_forward(module):
        raise RuntimeError("inside")
    assert "forward" not in vars(module)
    assert torch.equal(module(ids).logits, before)


def test_an_unknown_head_is_refused(monkeypatch):
    module = tiny("llama")
    plain = type(module).forward

    def scaled(self, *given, **options):
        found = plain(self, *given, **options)
        found.logits = found.logits * 2
        return found

    monkeypatch.setattr(type(module), "forward", scaled)
    with pytest.raises(ValueError, match="nats"), response_forward(module):
        pass


def test_dropout_is_taken_out():
    config = FAMILIES["gpt2"]()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    module = tiny(config).train()
    batch = collate(singles(some_rows()))
    names = ("input_ids", "attention_mask", "response_mask")
    with response_forward(module):
        assert not torch.equal(*(module(**{n: batch[n] for n in names}) for _ in range(2)))
        without_dropout(module)
        assert torch.equal(*(module(**{n: batch[n] for n in names}) for _ in range(2)))


def test_the_reference_is_computed_once(tmp_path):
    module, rows, again = tiny("llama"), some_rows(), some_rows()
    with response_forward(module):
        assert not add_reference(module, rows, ["model"], tmp_path)
        (file,) = tmp_path.iterdir()
        stamp = file.stat().st_mtime_ns
        module.forward = None  # a second pass would call it
        assert add_reference(module, again, ["model"], tmp_path)
        assert file.stat().st_mtime_ns == stamp
        module.forward = lambda **given: (_ for _ in ()).throw(RuntimeError("a pass"))
        for other in (["another model"], rows[:3]), (["model"], rows[:3]):
            with pytest.raises(RuntimeError, match="a pass"):
                add_reference(module, other[1], other[0], tmp_path)
    for one, two in zip(rows, again, strict=True):
        assert one.reference.tolist() == two.reference.tolist()
        assert len(one.reference) == len(one.response_ids)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_makes_a_pair(objective, rollouts, tmp_path):
    said: list[str] = []
    recipe = Recipe(objective, epochs=3, **QUICK | {"learning_rate": 3e-3})
    card = train(POLICY, rollouts, tmp_path / "prm", recipe, log=said.append)
    assert json.loads((tmp_path / "prm" / "pair.json").read_text()) == card
    assert (card["objective"], card["beta"]) == (objective, 10 if objective == "ipvrm" else 0.05)
    assert card["data"]["responses"] + card["data"]["held_out_responses"] == 1000
    assert 0.5 < card["metrics"]["held_out_pair_accuracy"] <= 1
    assert any(line.startswith("reference log-probabilities") for line in said)
    names = {path.name for path in (tmp_path / "prm").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "pair.json", "log.jsonl"} <= names
    assert not names & {"checkpoints", "training_args.bin"}

    policy = load_policy("demo")
    pair = ps.ImplicitPRM.from_pretrained(tmp_path / "prm")
    assert pair.reference is policy.lm  # the card's reference is the policy: one model
    assert pair.beta == card["beta"]
    assert told_apart(pair, rollouts) > (0.6 if objective == "kto" else 0.7)  # kto is slow: its gradients fade


def test_the_saved_pair_gives_the_rewards_that_were_trained(rollouts, tmp_path):
    """Rewards of the loaded pair == beta * (plain log-probs of the saved weights - the filed reference)."""
    from transformers import AutoModelForCausalLM

    train(POLICY, rollouts, tmp_path / "prm", Recipe(epochs=1, beta=0.2, **SMALL))
    pair = ps.ImplicitPRM.from_pretrained(tmp_path / "prm")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "prm").eval()
    assert saved.config.use_cache  # as the model that it began with
    base = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    for row in read_rollouts(rollouts)[:5]:
        ids = [*row.prompt_ids, *row.response_ids.tolist()]
        plain = [naive_logprobs(m, ids)[len(row.prompt_ids) :] for m in (saved, base)]
        (scores,) = pair.score([row.prompt_ids], [row.response_ids.tolist()])
        assert np.abs(scores.token_rewards - 0.2 * (plain[0] - plain[1])).max() < 1e-4


def test_lora_pair_is_an_adapter_on_its_reference(rollouts, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(POLICY).parent)
    recipe = Recipe(lora=8, epochs=4, **QUICK | {"learning_rate": 1e-2})
    card = train("policy", rollouts, tmp_path / "prm", recipe, delimiter=";")
    monkeypatch.chdir(tmp_path)  # the adapter finds its base from anywhere
    assert (card["reference"], card["delimiter"]) == (None, ";")
    assert not (tmp_path / "prm" / "model.safetensors").exists()
    policy = load_policy("demo")
    pair = ps.ImplicitPRM.from_pretrained(tmp_path / "prm")
    assert pair.reference is policy.lm
    assert pair.prm.module is policy.lm.module  # one copy of the base
    assert told_apart(pair, rollouts) > 0.7


def test_accumulation_changes_nothing_but_rounding(rollouts, tmp_path):
    for name, micro in (("one", 32), ("four", 8)):
        train(POLICY, rollouts, tmp_path / name, Recipe(epochs=1, **SMALL | {"micro_batch": micro}))
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    assert max((one[name] - four[name]).abs().max().item() for name in one) < 2e-4  # Adam's first steps are signs


def test_bfloat16_and_more_arguments(rollouts, tmp_path):
    card = train(
        POLICY, rollouts, tmp_path / "prm", Recipe(bf16=True, epochs=2, **QUICK | {"learning_rate": 3e-3}),
        arguments={"warmup_steps": 2, "activation_checkpointing": True},
    )  # fmt: skip
    assert card["metrics"]["held_out_pair_accuracy"] > 0.5
    assert {t.dtype for t in load_file(tmp_path / "prm" / "model.safetensors").values()} == {torch.float32}


IN_THE_SEVENTH_STEP = """
from transformers import Trainer
step, left = Trainer.training_step, [7]
def step_or_hold(*args, **options):
    left[0] -= 1
    if not left[0]:
        hold()
    return step(*args, **options)
Trainer.training_step = step_or_hold
"""


def test_killed_and_resumed_is_as_if_never_killed(rollouts, tmp_path):
    """SIGKILL between two checkpoints: the run goes on from the last one and ends with the same weights."""
    recipe = Recipe(epochs=12, save_steps=4, **SMALL)
    args = ["train", "--model", POLICY, "--rollouts", str(rollouts), "--lr", "1e-3", "--micro-batch", "32"]
    args += ["--batch", "32", "--holdout", "0.25", "--epochs", "12", "--save-steps", "4", "--problems", "80"]
    args += ["--out", str(tmp_path / "cut")]
    with held(IN_THE_SEVENTH_STEP, *args, float64=False):
        assert list((tmp_path / "cut").glob("checkpoints/checkpoint-*/trainer_state.json"))
    assert not (tmp_path / "cut" / "pair.json").exists()
    (tmp_path / "cut" / "checkpoints" / "checkpoint-9999").mkdir()  # one that was being written
    with pytest.raises(ValueError, match="resume"):
        train(POLICY, rollouts, tmp_path / "cut", recipe)
    with pytest.raises(ValueError, match="same"):
        train(POLICY, rollouts, tmp_path / "cut", Recipe(epochs=13, save_steps=4, **SMALL), resume=True)
    resumed = train(POLICY, rollouts, tmp_path / "cut", recipe, resume=True)
    whole = train(POLICY, rollouts, tmp_path / "whole", recipe)
    assert resumed["metrics"] == whole["metrics"]
    assert whole["metrics"]["steps"] >= 80
    logs = [lines(tmp_path / name / "log.jsonl") for name in ("cut", "whole")]
    assert [each["step"] for each in logs[0]] == [each["step"] for each in logs[1]]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)  # the first line after the resume too
    cut, uncut = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert max((cut[name] - uncut[name]).abs().max().item() for name in cut) < 1e-6


def test_rollout_train_score_by_commands(rollouts, tmp_path, capsys, monkeypatch):
    """The half minute from rollouts to a pair that tells right from wrong responses to problems it has not seen."""
    monkeypatch.chdir(tmp_path)
    assert main(
        ["train", "--model", "demo", "--rollouts", str(rollouts), "--out", "prm", "--lr", "3e-3", "--epochs", "5",
         "--micro-batch", "32", "--batch", "32", "--delimiter", ";"]
    ) == 0  # fmt: skip
    assert re.search(r"trained on \d+ items; held-out pair accuracy 0\.\d{3} of \d+ pairs\n", capsys.readouterr().err)
    asked = problems(60, split="test", length=3)
    Path("test.jsonl").write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in asked))
    sampled = ["rollout", "--policy", "demo", "--data", "test.jsonl", "--label", "exact", "--seed", "9"]
    assert main([*sampled, "--out", "test_rollouts.jsonl"]) == 0
    rows = read_rollouts("test_rollouts.jsonl")
    Path("responses.jsonl").write_text(
        "".join(json.dumps({"prompt": list(r.prompt_ids), "response": r.response_ids.tolist()}) + "\n" for r in rows)
    )
    capsys.readouterr()
    assert main(["score", "--pair", "prm", "--data", "responses.jsonl", "--json"]) == 0
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(scores[0]["step_rewards"]) == 3  # the card's delimiter
    assert pair_accuracy(rows, [each["reward"] for each in scores]) > 0.7


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "no such model": (["--model", "./none"], "none"),
    "no such rollouts": (["--rollouts", "none.jsonl"], "none.jsonl"),
    "no model in the folder": (["--model", "."], "config.json"),
    "an adapter": (["--model", "adapter"], "merge it first"),
    "unknown objective": (["--objective", "ppo"], "--objective"),
    "beta 0": (["--beta", "0"], "beta=0"),
    "a finished pair": (["--out", str(pair_dir())], "holds a pair"),
    "batch in parts": (["--batch", "33"], "batch=33"),
    "other vocabulary": (["--rollouts", "alien.jsonl"], "vocabulary"),
    "one label": (["--rollouts", "right.jsonl", "--objective", "dpo"], "no pairs"),
    "no argument file": (["--arguments", "none.json"], "--arguments"),
    "argument list": (["--arguments", "list.json"], "--arguments"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, rollouts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("alien.jsonl").write_text('{"prompt_ids": [1], "response_ids": [999], "label": 1}\n')
    Path("right.jsonl").write_text('{"prompt_ids": [1], "response_ids": [5], "label": 1}\n')
    Path("list.json").write_text("[]")
    given = {"--model": "demo", "--rollouts": str(rollouts), "--out": "out", "--holdout": "0"}
    args, word = BAD[case]
    given |= dict(zip(args[::2], args[1::2], strict=True))
    assert main(["train", *(part for option in given.items() for part in option)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prm-search:")]
    assert word in said[-1]
    assert len(said) == 1
    assert not Path("out/pair.json").exists()


def test_missing_packages_are_named(monkeypatch, rollouts, tmp_path):
    monkeypatch.setattr("prm_search.training.run.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(ImportError, match=r"peft.*prm-search\[train\]"):
        train(POLICY, rollouts, tmp_path / "prm", Recipe(lora=4))


def test_what_is_trained_and_scored_by_default_has_one_beta():
    assert pair_card.BETA == BETA
