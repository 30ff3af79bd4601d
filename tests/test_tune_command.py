"""prm-search tune: what it writes, a run that goes on, bad input, and its guidance used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from records import lines, write

from prm_search.cli import main
from prm_search.demo.chains import answer, problems
from prm_search.driver.guidance_file import read_guidance
from prm_search.evaluation.tuning import run
from prm_search.evaluation.tuning.pilot import scale_of

ANSWER = "prm_search.demo.chains:answer"
COMMAND = [
    "tune", "--policy", "demo", "--pair", "demo", "--label", "exact", "--answer", ANSWER, "--data", "data.jsonl",
    "--strategies", "best_of_n,beam", "--values", "min", "--max-new-tokens", "24",
]  # fmt: skip


@pytest.fixture
def folder(workdir: Path, demo_models: object) -> Path:
    asked = problems(8, length=3, split="gate")
    write("data.jsonl", [{"question": p.prompt, "answer": p.answer} for p in asked])
    return workdir


def test_it_tries_picks_confirms_and_goes_on_where_it_stopped(folder, capsys):
    assert main([*COMMAND, "--budget", "48", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    card = json.loads(Path("out/tune.json").read_text())
    (verdict,) = card["verdicts"]
    assert verdict["sentence"] in shown
    assert verdict["budget"] == {"tokens": 48, "seconds": None}
    names = {line["strategy"]["name"] for line in card["tried"]}
    assert names == {"best_of_n", "beam"}
    guided = read_guidance("out/guidance.yaml")
    assert guided.models["pair"] == "demo"
    assert guided.choice["answer"] is answer
    assert guided.steps.delimiter in (";", (";",))  # the pair's card says so
    for name in ("tune.md", "accuracy-tokens.png", "accuracy-seconds.png"):
        assert Path("out", name).is_file()
    trials, confirm = lines("out/trials.jsonl"), lines("out/confirm.jsonl")
    assert {record["problem"] for record in trials} == set(range(4))

    page, guidance = Path("out/tune.md").read_text(), Path("out/guidance.yaml").read_text()
    Path("out/tune.md").unlink()
    assert main([*COMMAND, "--budget", "48", "--out", "out", "--report-only"]) == 0
    assert Path("out/tune.md").read_text() == page
    # a run that was stopped: some records are not there yet
    kept = Path("out/trials.jsonl").read_text().splitlines(keepends=True)
    Path("out/trials.jsonl").write_text("".join(kept[: len(kept) // 2]))
    assert main([*COMMAND, "--budget", "48", "--out", "out"]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*COMMAND, "--budget", "48", "--out", "out", "--resume"]) == 0
    assert len(lines("out/trials.jsonl")) == len(trials)
    assert lines("out/confirm.jsonl") == confirm
    assert Path("out/guidance.yaml").read_text() == guidance
    assert main([*COMMAND, "--budget", "64", "--out", "out", "--resume"]) == 2
    assert "of other inputs or settings" in capsys.readouterr().err

    assert main(["generate", "--config", "out/guidance.yaml", "--prompt", problems(1)[0].prompt, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == answer(result["text"]) is not None


def test_several_budgets_in_tokens(folder, capsys):
    assert main([*COMMAND, "--budget", "48,24", "--limit", "4", "--bins", "1", "--out", "two"]) == 0
    assert Path("two/guidance.yaml").read_text() == Path("two/guidance-48-tokens.yaml").read_text()
    assert Path("two/guidance-24-tokens.yaml").is_file()


def test_a_budget_in_seconds(folder, monkeypatch):
    """The pilot is told what a token takes: an hour, which no machine comes near to. So 48 hours are 48 tokens."""
    monkeypatch.setattr(run, "scale_of", lambda *pilot: replace(scale_of(*pilot), seconds=3600.0))
    assert main([*COMMAND, "--budget-seconds", str(48 * 3600), "--limit", "4", "--bins", "1", "--out", "slow"]) == 0
    card = json.loads(Path("slow/tune.json").read_text())
    assert [verdict["budget"] for verdict in card["verdicts"]] == [{"tokens": None, "seconds": 48 * 3600}]
    assert {line["strategy"]["name"] for line in card["tried"]} == {"best_of_n", "beam"}
    assert read_guidance("slow/guidance.yaml").budget.seconds == 48 * 3600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a budget is needed: --budget, in tokens, or --budget-seconds"),
        (["--budget", "48", "--budget-seconds", "1"], "a budget is needed"),
        (["--budget", "many"], "--budget 'many'"), (["--budget", "0"], "--budget"),
        (["--budget-seconds", "0"], "--budget-seconds 0.0"), (["--budget", "48", "--strategies", "beams"], "beams"),
        (["--budget", "48", "--values", "best"], "best"), (["--budget", "48", "--alphas", "x"], "--alphas 'x'"),
        (["--budget", "48", "--bins", "0"], "--bins 0"), (["--budget", "48", "--limit", "3"], "at least 4 are needed"),
        (["--budget", "48", "--report-only"], "holds no tuning"),
        (["--budget", "48", "--workers", "2"], "--workers needs --ray"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folder, capsys, options, message):
    assert main([*COMMAND, "--out", "out", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_models_are_needed(folder, capsys):
    assert main(["tune", "--policy", "demo", "--data", "data.jsonl", "--budget", "48", "--out", "out"]) == 2
    assert "a reward model is needed" in capsys.readouterr().err
