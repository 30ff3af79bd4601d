"""examples/grade_school: problems of events, the gate, the vote, wrong lines, and the whole recipe on a tiny model."""

from __future__ import annotations

import itertools
import json
import random
import re
import shlex
from pathlib import Path

import events
import hf_models
import pytest
import run
import run_page
import score
import typer
from events import LARGEST, SPLITS, problems, split_of

from prm_search.cli import app, main

ROOT = Path(__file__).resolve().parents[1]

LINE = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")

# -- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", events.STEPS)
def test_every_line_is_right_and_goes_on_from_the_one_before(steps):
    for problem in problems(100, split="prm", steps=steps):
        assert len(problem.steps) == steps
        numbers = [int(each) for each in re.findall(r"\d+", problem.question)]
        before = numbers.pop(0)
        assert 2 <= before <= 12
        for line in problem.steps:
            left, operation, right, result = LINE.fullmatch(line).groups()
            assert int(left) == before
            assert (
                int(result) == {"+": before + int(right), "-": before - int(right), "*": before * int(right)}[operation]
            )
            assert 1 <= int(result) <= LARGEST
            if int(right) == (numbers[0] if numbers else None):
                numbers.pop(0)
            else:  # told in a word
                assert {"2": "doubles", "3": "triples"}[right] in problem.question
            before = int(result)
        assert numbers == []
        assert problem.answer == str(before)
        assert not re.search(r"[{}]|\s\s", problem.question)


def test_no_question_is_in_two_splits_and_each_has_its_share():
    drawn = {split: {problem.question for problem in problems(200, split=split, steps=3)} for split in SPLITS}
    assert all(split_of(question) == split for split, questions in drawn.items() for question in questions)
    assert all(len(questions) == 200 for questions in drawn.values())
    rng = random.Random(0)
    counts = dict.fromkeys(SPLITS, 0)
    for _ in range(2000):
        counts[split_of(events.draw(3, rng).question)] += 1
    for split, share in SPLITS.items():
        assert abs(counts[split] / 2000 - share) < 0.05


def test_draws_are_deterministic_and_begin_alike():
    assert problems(50, split="test", steps=2, seed=3)[:20] == problems(20, split="test", steps=2, seed=3)
    assert problems(20, split="test", steps=2, seed=4) != problems(20, split="test", steps=2, seed=3)


@pytest.mark.parametrize(
    ("given", "name"),
    [({"n": -1}, "n must"), ({"n": True}, "n must"), ({"split": "train"}, "split must"), ({"steps": 0}, "steps must"),
     ({"steps": 6}, "steps must")],
)  # fmt: skip
def test_bad_arguments_are_named(given, name):
    with pytest.raises(ValueError, match=name):
        problems(**{"n": 3, "split": "test", "steps": 2, **given})


def test_the_command_writes_worked_or_final_answers(tmp_path, capsys):
    out = tmp_path / "made.jsonl"
    command = ["--split", "test", "--n", "3", "--steps", "2", "--out", str(out)]
    drawn = problems(3, split="test", steps=2)
    assert events.main(command) == 0
    assert [record["answer"] for record in run.lines(out)] == [problem.answer for problem in drawn]
    assert events.main([*command, "--worked"]) == 0
    assert [record["answer"] for record in run.lines(out)] == ["\n".join(problem.steps) for problem in drawn]
    with pytest.raises(SystemExit, match="2"):
        events.main([*command[:-1], str(tmp_path / "none" / "made.jsonl")])
    assert "No such file" in capsys.readouterr().err


# -- the recipe --------------------------------------------------------------------------------------------------------


def labelled(*responses: tuple[int, str | None, int]) -> list[dict]:
    """Records of rollouts: problem, answer, label; the right answer is always 5."""
    return [
        {"index": place, "problem": problem, "answer": answer, "label": label, "reference_answer": "5"}
        for place, (problem, answer, label) in enumerate(responses)
    ]


def test_shares_of_labelled_responses():
    records = labelled((0, "4", 0), (0, "5", 1), (1, "4", 0), (1, "4", 0), (2, "5", 1), (2, None, 0))
    found = run.measure(list(reversed(records)))
    assert found == {"problems": 3, "pass@1": pytest.approx(1 / 3), "majority": 1 / 3, "pass@n": 2 / 3}


def test_a_vote_is_by_weight_then_by_order_and_silent_responses_have_none():
    assert run.vote(["4", "5", "5"], [1, 1, 1]) == "5"
    assert run.vote(["4", "5"], [1, 1]) == "4"
    assert run.vote(["4", "5", "5"], [3, 1, 1]) == "4"
    assert run.vote([None, "5"], [9, 1]) == "5"
    assert run.vote([None], [1]) is None


@pytest.mark.parametrize(
    ("text", "place"),
    [("1+1=2\n2*3=6", -1), ("1+1=3\n3*3=9", 0), ("1+1=2\n2*3=5", 1), ("1+1=2", 0), ("1+1=2\n2*3=6\n6-1=5", 2)],
)
def test_the_first_wrong_line(text, place):
    assert run.first_wrong(text, ("1+1=2", "2*3=6")) == place


def test_the_gate_goes_up_where_problems_are_too_easy_and_down_where_too_hard(tmp_path, monkeypatch):
    easy = [(p, "5", 1) for p in range(4) for _ in range(2)]
    fits = [(p, answer, int(answer == "5")) for p in range(4) for answer in ("4", "5")]
    hard = [(p, "4", 0) for p in range(4) for _ in range(2)]
    for name, shown, chosen in (
        ("up", {3: easy, 4: fits}, 4),
        ("down", {3: hard, 2: fits}, 2),
        ("at once", {3: fits}, 3),
    ):
        out = tmp_path / name
        out.mkdir()
        monkeypatch.setattr(run, "rollouts", lambda out, split, steps, n, settings: steps)
        monkeypatch.setattr(run, "lines", lambda steps, shown=shown: labelled(*shown[steps]))
        assert run.gate(out, run.Settings()) == chosen
        assert json.loads((out / "gate.json").read_text())["steps"] == chosen
        monkeypatch.setattr(run, "rollouts", None)  # it is not asked again
        assert run.gate(out, run.Settings()) == chosen
    monkeypatch.setattr(run, "rollouts", lambda out, split, steps, n, settings: steps)
    monkeypatch.setattr(run, "lines", lambda steps: labelled(*(easy if steps == 3 else hard)))
    (tmp_path / "none").mkdir()
    with pytest.raises(run.Stopped, match="at no length"):
        run.gate(tmp_path / "none", run.Settings())


def test_pairs_of_right_and_wrong_responses_to_one_problem():
    records = [
        {"samples": [{"right": right, "values": {"prm": {"q": q}}} for right, q in samples]}
        for samples in ([(True, 1.0), (False, 0.0), (False, 1.0)], [(True, -1.0), (False, 0.0)], [(True, 9.0)])
    ]
    assert run.pair_accuracy(records) == pytest.approx(1.5 / 3)
    assert run.pair_accuracy(records[2:]) is None


def scored_alike(pair: Path, rollouts: Path, folder: Path) -> None:
    """Packed scores are those of `prm-search eval`, and the same answers are chosen by them."""
    given = ["--pair", str(pair), "--rollouts", str(rollouts), "--out", str(folder / "scored")]
    assert score.main(given) == score.main(given) == 0  # the second time from its scores
    status = main(["eval", "--responses", str(rollouts), "--pair", str(pair), "--label", "exact", "--answer", "number",
                   "--budgets", "2", "--out", str(folder / "official")])  # fmt: skip
    assert status == 0
    both = (run.lines(folder / name / "records.jsonl") for name in ("scored", "official"))
    for ours, theirs in zip(*both, strict=True):
        for sample, other in zip(ours["samples"], theirs["samples"], strict=True):
            assert (sample["text"], sample["answer"], sample["right"]) == (
                other["text"],
                other["answer"],
                other["right"],
            )
            assert sample["values"]["prm"]["q"] == pytest.approx(other["values"][str(pair)]["q"], abs=1e-4)
        assert [each["answer"] for each in ours["chosen"]] == [each["answer"] for each in theirs["chosen"]]


def test_the_whole_recipe_goes_on_where_it_stopped_and_makes_its_page(tmp_path, monkeypatch, capsys):
    """A tiny random model is never right, so its PRM does not pass; what comes after that gate is then let through."""
    hf_models.llama(0).save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(run, "PASS_AT_1", (0.0, 1.0))
    monkeypatch.setattr(run, "GAP", 0.0)
    monkeypatch.setattr(run, "ASKED", tuple("6" if each == "64" else each for each in run.ASKED))
    out = tmp_path / "run"
    command = [
        "--out", str(out), "--model", str(tmp_path / "model"), "--sft", "1", "--sft-epochs", "1", "--gate", "5",
        "--rollouts", "2", "--samples", "2", "--test", "2", "--freeze-layers", "1",
    ]  # fmt: skip
    assert run.main(command) == 1
    assert "pair accuracy is None, and 0.65 is needed" in capsys.readouterr().err
    in_order = sorted(run.lines(out / "gate-3-rollouts.jsonl"), key=lambda record: record["index"])
    (tmp_path / "gate.jsonl").write_text("".join(json.dumps(record) + "\n" for record in in_order))
    scored_alike(out / "prm", tmp_path / "gate.jsonl", tmp_path)
    assert run.main([*command[:-1], "0"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert json.loads((out / "prm" / "pair.json").read_text())["recipe"]["pack"]
    kept = (out / "prm-3-rollouts.jsonl").read_text()
    monkeypatch.setattr(run, "pair_accuracy", lambda scored: 0.9)
    turns = itertools.cycle((-1, 0))  # some with an error, some without
    monkeypatch.setattr(run, "first_wrong", lambda text, steps: next(turns))
    assert run.main(command) == 0
    assert (out / "prm-3-rollouts.jsonl").read_text() == kept
    kinds = [record["kind"] for record in run.lines(out / "eval" / "records.jsonl")]
    assert sorted(kinds) == ["greedy"] * 2 + ["samples"] * 2 + ["search"] * 2
    assert run.lines(out / "steps" / "steps.jsonl")
    assert run_page.main(["--run", str(out), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "report.md").read_text()
    for part in (
        "Word problems of 3 steps",
        "weighted q softmax",
        "**0.900**",
        "its calculations recur",
        "freeze layers: 1",
    ):
        assert part in text
    assert str(tmp_path) not in text + (tmp_path / "page" / "report.json").read_text()
    with pytest.raises(SystemExit, match="2"):
        run_page.main(["--run", str(tmp_path), "--out", str(tmp_path / "page")])


# -- the tutorial ------------------------------------------------------------------------------------------------------


def tutorial() -> list[list[str]]:
    """The commands of the tutorial's section, as words."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    section = page.partition("## A natural-language task\n")[2].partition("\n## ")[0]
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    shown = "".join(body for kind, body in fences if not kind).replace("\\\n", " ")
    return [shlex.split(line) for line in shown.splitlines() if line.startswith(("prm-search", "python "))]


def test_the_tutorial_has_the_whole_sequence():
    scripts = [f"examples/grade_school/{name}.py" for name in ("run", "run_page", *["events"] * 3, "sft")]
    assert [command[1] for command in tutorial()] == [*scripts, "rollout", "train", "eval"]


@pytest.mark.parametrize("command", tutorial(), ids=lambda command: " ".join(command[:3]))
def test_the_tutorial_commands_are_understood(command):
    if command[0] == "python":
        assert (ROOT / command[1]).is_file()
        if Path(command[1]).name == "events.py":
            assert events.parser().parse_args(command[2:])
        return
    known = typer.main.get_command(app).commands[command[1]]
    context = known.make_context(command[1], command[2:])  # options, and the kinds of their values
    assert context.params["template" if "--template" in command else "out"]
