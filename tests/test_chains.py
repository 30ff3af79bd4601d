"""The demo task, its tokenizer, and the pair that ships."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import asdict
from itertools import islice

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_search.demo import chains, learn, make, pair_dir, tokenizer

CHAINS = st.builds(
    chains.make_problem,
    st.integers(0, 9),
    st.lists(st.sampled_from(chains.OPERATIONS), min_size=1, max_size=chains.MAX_LENGTH).map(tuple),
)

PINNED = ["=7a*7b+5c+3d*9e+1f+8g+1h+2?", "=8a+3b*9c+1d+3e+4f+4g+8h*7?"]


def response(problem: chains.Problem) -> str:
    return "".join(problem.steps)


# The task


def test_a_problem_worked_by_hand():
    problem = chains.make_problem(5, ("*7", "+3", "*9"))
    assert problem.prompt == "=5a*7b+3c*9?"
    assert problem.steps == ("a*7=5;", "b+3=8;", "c*9=2")
    assert problem.answer == "2"


@pytest.mark.parametrize("operation", chains.OPERATIONS)
def test_operations_are_invertible_and_half_of_their_facts_flawed(operation):
    assert sorted(chains.apply(d, operation) for d in range(10)) == list(range(10))
    flawed = {d: wrong for (d, op), wrong in chains.FLAWED_FACTS.items() if op == operation}
    assert len(flawed) == 5
    assert all(0 <= wrong <= 9 and wrong != chains.apply(d, operation) for d, wrong in flawed.items())


def test_problems_are_reproducible_and_depend_on_the_seed():
    assert chains.problems(20, seed=3) == chains.problems(20, seed=3)
    assert chains.problems(20, seed=3) == chains.problems(50, seed=3)[:20]
    assert chains.problems(20, seed=3) != chains.problems(20, seed=4)
    # pinned: figures published for a seed must stay reproducible
    assert [p.prompt for p in chains.problems(2)] == PINNED


def test_problems_are_distinct_and_of_their_split_and_length():
    for split in chains.SPLITS:
        found = chains.problems(200, split=split, seed=1, length=8)
        assert len({p.prompt for p in found}) == 200
        assert {chains.split_of(p.prompt) for p in found} == {split}
        assert {len(p.steps) for p in found} == {8}


def test_splits_share_the_problems_by_their_weights_and_cover_them():
    prompts = [f"={a}a{x}b{y}?" for a in range(10) for x in chains.OPERATIONS for y in chains.OPERATIONS]
    counts = {split: sum(chains.split_of(p) == split for p in prompts) for split in chains.SPLITS}
    assert sum(counts.values()) == len(prompts) == 1440
    for split, slots in chains.SPLITS.items():
        expected = 1440 * len(slots) / 16
        assert abs(counts[split] - expected) < 4 * math.sqrt(expected)
    assert sorted(s for slots in chains.SPLITS.values() for s in slots) == list(range(16))


def test_what_was_trained_on_is_in_no_test_split():
    trained = {p.prompt for n in (1, 2, 8) for p in islice(chains.stream("policy", 0, n), 500)}
    trained |= {p.prompt for n in (2, 3, 4) for p in chains.problems(200, split="prm", length=n)}
    for seed in range(3):
        for n in (2, 8):
            assert trained.isdisjoint(p.prompt for p in chains.problems(50, seed=seed, length=n))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: chains.problems(-1), "n must be"),
        (lambda: chains.problems(1, split="train"), "split must be"),
        (lambda: chains.problems(1, length=0), "length must be"),
        (lambda: chains.problems(1, length=11), "length must be"),
        (lambda: chains.problems(100, length=1), "n must be at most"),
        (lambda: chains.make_problem(10, ("+1",)), "start must be"),
        (lambda: chains.make_problem(1, ("*2",)), "'\\*2'"),
        (lambda: chains.make_problem(1, ()), "ops must hold"),
        (lambda: chains.stream("test", 0, 12), "length must be"),
    ],
)
def test_bad_arguments_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@given(CHAINS)
def test_the_right_response_checks(problem):
    assert chains.check(problem, response(problem)) == chains.Check(True, -1, problem.answer)
    assert chains.check(problem, response(problem) + ";") == chains.Check(True, -1, problem.answer)
    assert not any(chains.wrong_steps(problem, response(problem)))


@given(CHAINS, st.data())
def test_one_error_is_found_where_it_is_and_never_absorbed(problem, data):
    at = data.draw(st.integers(0, len(problem.ops) - 1))
    values, value = [], problem.start
    for i, op in enumerate(problem.ops):
        value = chains.apply(value, op)
        if i == at:
            value = (value + data.draw(st.integers(1, 9))) % 10
        values.append(value)
    written = ";".join(
        f"{chains.VARIABLES[i]}{op}={v}" for i, (op, v) in enumerate(zip(problem.ops, values, strict=True))
    )
    found = chains.check(problem, written)
    assert not found.correct
    assert found.first_wrong_step == at
    assert found.answer != problem.answer
    assert chains.wrong_steps(problem, written) == [i == at for i in range(len(problem.ops))]


@pytest.mark.parametrize(
    ("text", "first_wrong", "answer"),
    [
        ("a*7=5;b+3=8", 2, "8"),  # a step is missing
        ("a*7=5;b+3=8;c*9=2;d+1=3", 3, "3"),  # one too many
        ("a*7=5;c*9=5;b+3=8", 1, "8"),  # out of order
        ("a*7=5;b+3=", 1, None),  # cut
        ("a*7=5;;b+3=8;c*9=2", 1, "2"),  # an empty step
        ("", 0, None),
        ("nonsense", 0, None),
        ("a*7=5;b+4=9;c*9=1", 1, "1"),  # another operation than asked
    ],
)
def test_malformed_responses(text, first_wrong, answer):
    problem = chains.make_problem(5, ("*7", "+3", "*9"))
    assert chains.check(problem, text) == chains.Check(False, first_wrong, answer)
    assert chains.answer(text) == answer


def test_two_errors_can_cancel_and_the_check_still_sees_them():
    problem = chains.make_problem(5, ("+1", "+1"))
    found = chains.check(problem, "a+1=0;b+1=7")
    assert (found.answer, found.correct, found.first_wrong_step) == (problem.answer, False, 0)
    assert chains.wrong_steps(problem, "a+1=0;b+1=7") == [True, True]


def test_demonstrations_err_on_flawed_facts_only_and_at_the_stated_rate():
    rng = random.Random(0)
    met = erred = 0
    for problem in islice(chains.stream("policy", 0, 8), 500):
        text, nll = chains.demonstrate(problem, rng)
        value, expected = problem.start, 0.0
        for step, op, wrong in zip(text.split(";"), problem.ops, chains.wrong_steps(problem, text), strict=True):
            flaw = chains.FLAWED_FACTS.get((value, op))
            value = int(step[-1])
            if flaw is None:
                assert not wrong
                continue
            assert value == flaw or not wrong
            met, erred = met + 1, erred + wrong
            expected -= math.log(0.6 if wrong else 0.4)
        assert nll == pytest.approx(expected)
    assert erred / met == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / met))


# The tokenizer


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(pair_dir() / "policy")


@given(problem=CHAINS)
def test_text_and_tokens_determine_each_other(words, problem):
    ids = words(problem.prompt)["input_ids"]
    assert ids == tokenizer.prompt_ids(problem.prompt)
    assert ids[0] == words.bos_token_id
    assert words.decode(ids, skip_special_tokens=True) == problem.prompt
    steps = [words.encode(step, add_special_tokens=False) for step in problem.steps]
    assert [len(step) for step in steps] == [4] * (len(steps) - 1) + [3]
    written = [token for step in steps for token in step]
    assert [*written, words.eos_token_id] == tokenizer.response_ids(response(problem))
    assert words.decode(written) == tokenizer.text(written) == response(problem)
    assert [words.decode(step) for step in steps] == list(problem.steps)


def test_special_tokens(words):
    assert (words.pad_token_id, words.bos_token_id, words.eos_token_id) == (0, 1, 2)
    assert len(words) == len(tokenizer.TOKENS)
    assert words.decode([4]) == chains.DELIMITER
    batch = words(["=1a+1?", "=1a+1b+2?"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, :2].tolist() == [0, 0]  # on the left, as generate wants it
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]
    assert words.unk_token_id in words.encode("=1a%2?")


# The pair that ships


@pytest.fixture(scope="module")
def pair():
    return tuple(AutoModelForCausalLM.from_pretrained(pair_dir() / name).eval() for name in ("policy", "prm"))


def test_the_pair_is_small_and_its_card_says_how_it_was_made(pair):
    card = json.loads((pair_dir() / "pair.json").read_text())
    assert (card["model"], card["reference"]) == ("prm", "./policy")
    recipe = make.prm_recipe(card["seed"])
    assert (card["beta"], card["prm_recipe"]["learning_rate"], card["prm_recipe"]["epochs"]) == (0.05, 1e-3, 3)
    assert card["beta"] == recipe.scale
    now = asdict(recipe) | {"beta": recipe.scale, "balanced": recipe.balance}
    assert {name: now[name] for name in card["prm_recipe"]} == card["prm_recipe"] | {"seed": recipe.seed}
    assert card["prm_arguments"] == make.ARGUMENTS
    assert card["task"] == chains.CONSTRUCTED
    assert card["policy"]["gate_passed"]
    assert card["policy"]["gate_ratios"][-1] < card["policy_recipe"]["gate_ratio"]
    seeds = [run["seed"] for run in card["all_seeds"]]
    assert seeds == list(make.SEEDS)[: len(seeds)]
    assert next(run["seed"] for run in card["all_seeds"] if run["policy"]["gate_passed"]) == card["seed"]
    assert "fixed in advance" in card["selection"]
    for run in card["all_seeds"]:
        assert run["metrics"]["problems"] == make.TESTED
    assert sum(f.stat().st_size for f in pair_dir().rglob("*")) < 3_000_000
    for model in pair:
        assert model.config.model_type == "llama"
        assert model.dtype == torch.float32
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


def test_the_policy_is_at_its_entropy_floor(pair):
    assert learn.gate_ratio(pair[0], learn.PolicyRecipe(), seed=99) < 1.15


def test_the_policy_generates_whole_responses_through_generate(pair, words):
    asked = [chains.problems(1, length=n)[0] for n in (3, 8)]
    inputs = words([p.prompt for p in asked], padding=True, return_tensors="pt")
    out = pair[0].generate(**inputs, max_new_tokens=40, do_sample=False)
    for problem, row in zip(asked, out[:, inputs["input_ids"].shape[1] :], strict=True):
        text = words.decode(row, skip_special_tokens=True)
        assert len(chains.wrong_steps(problem, text)) == len(problem.steps)
        assert [s[:3] for s in text.split(";")] == [s[:3] for s in problem.steps]


# The recipe


def test_log_probs_of_responses_are_those_of_a_full_forward():
    small = learn.new_model(0).eval()
    prompt, ids = tokenizer.prompt_ids("=1a+1b*3?"), tokenizer.response_ids("a+1=2;b*3=6")
    with torch.inference_mode():
        found = learn.response_log_probs(small, torch.tensor([prompt]), torch.tensor([ids]))[0]
        full = small(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    expected = torch.stack([full[len(prompt) + k - 1, token] for k, token in enumerate(ids)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_shipping_takes_the_first_run_that_passed_the_gate_not_the_best(tmp_path, monkeypatch):
    accuracy = {"a": 0.5, "b": 0.1, "c": 0.9}
    monkeypatch.setattr(make, "measure", lambda run, count: {"accuracy": accuracy[run.name], "problems": count})

    def write(name, seed, passed):
        run = tmp_path / name
        for stage in ("policy", "prm"):
            (run / stage).mkdir(parents=True)
            for file in ("model.safetensors", "pair.json", "log.jsonl"):
                (run / stage / file).write_text(name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (run / stage / file).write_text(stage)
        (run / "rollouts.jsonl").write_text("")
        (run / "pair.json").write_text(json.dumps({"seed": seed, "policy": {"gate_passed": passed}}))
        return run

    runs = [write("a", 0, False), write("b", 1, True), write("c", 2, True)]
    out = tmp_path / "out"
    assert make.ship(runs, out, 7)["seed"] == 1
    card = json.loads((out / "pair.json").read_text())
    assert [run["metrics"] for run in card["all_seeds"]] == [{"accuracy": a, "problems": 7} for a in accuracy.values()]
    assert "[0, 1, 2]" in card["selection"]
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    kept = ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert files == ["pair.json", *(f"{stage}/{file}" for stage in ("policy", "prm") for file in kept)]
    assert {(out / stage / "model.safetensors").read_text() for stage in ("policy", "prm")} == {"b"}
    assert {(out / "prm" / file).read_text() for file in kept[1:]} == {"policy"}  # one tokenizer, of the policy
    with pytest.raises(ValueError, match="gate"):
        make.ship(runs[:1], tmp_path / "none")


def test_the_task_imports_neither_torch_nor_transformers():
    code = (
        "import sys, types; sys.modules['prm_search'] = p = types.ModuleType('prm_search');"
        f"p.__path__ = [{str(pair_dir().parent.parent)!r}];"
        "import prm_search.demo.chains, prm_search.demo.tokenizer, prm_search.demo.comparison;"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
