"""Step errors: boundaries of steps, thresholds, F1, AUC and localisation, by hand and against a slow way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from records import lines, write

import prm_search as ps
from prm_search.cli import main
from prm_search.demo.chains import check, demonstrate, problems
from prm_search.evaluation import Solution, score_steps, summarise_steps
from prm_search.evaluation.statistics import harmonic_mean
from prm_search.evaluation.step_errors import first_below, fit_threshold
from prm_search.evaluation.step_scores import encode_steps
from prm_search.tree import Prompt


def f1(scores, labels, threshold):
    """The definition: two accuracies and their harmonic mean."""
    met = [first_below(each, threshold) == label for each, label in zip(scores, labels, strict=True)]
    wrong = [hit for hit, label in zip(met, labels, strict=True) if label >= 0]
    correct = [hit for hit, label in zip(met, labels, strict=True) if label < 0]
    return harmonic_mean(sum(wrong) / len(wrong), sum(correct) / len(correct))


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_first_below():
    assert first_below([0.3, 0.1, -0.2], 0.2) == 1
    assert first_below([0.3, 0.1], 0.1) == -1  # not below
    assert first_below([0.3, 0.1], 9.0) == 0


def test_a_threshold_by_hand():
    scores, labels = [[1.0, -1.0], [-0.5, 3.0], [0.5, 0.2]], [1, 0, -1]
    # the first needs t in (-1, 1], the second t > -0.5, the third t <= 0.2
    found = fit_threshold(scores, labels)
    assert -0.5 < found <= 0.2
    assert f1(scores, labels, found) == 1.0


def test_the_middle_of_equally_good_ones():
    assert fit_threshold([[0.0], [1.0]], [0, -1]) == 0.5


SOLUTIONS = st.lists(
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=5).flatmap(
        lambda scores: st.tuples(st.just(scores), st.integers(-1, len(scores) - 1))
    ),
    min_size=2,
    max_size=12,
).filter(lambda found: {label >= 0 for _, label in found} == {True, False})


@given(SOLUTIONS)
def test_no_other_threshold_is_better(found):
    scores, labels = [each for each, _ in found], [label for _, label in found]
    best = f1(scores, labels, fit_threshold(scores, labels))
    assert best == pytest.approx(max(f1(scores, labels, t / 2) for t in range(-9, 10)))


def test_thresholds_need_both_kinds():
    with pytest.raises(ValueError, match="with an error and solutions without"):
        fit_threshold([[1.0]], [0])


# -- the table ---------------------------------------------------------------------------------------------------------


def record(problem: int, scores: list[float], label: int) -> dict:
    return {"problem": problem, "label": label, "scores": {"last": scores}}


def random_records(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        label = int(rng.integers(-1, 4))
        scores = rng.normal(size=4)
        if label >= 0:
            scores[label] -= 2.0
        found.append(record(i // 2, scores.tolist(), label))
    return found


def test_a_given_threshold_by_hand():
    records = [
        record(0, [1.0, -1.0, 0.0], 1),  # found; its lowest score is the error's
        record(1, [1.0, 0.5, -2.0], 1),  # said 2
        record(2, [0.5, 0.1, 0.3], -1),  # right
        record(3, [-0.1, 1.0, 1.0], -1),  # said 0
        record(4, [0.2, 0.3, 0.4], -1),  # right
    ]
    summary = summarise_steps(records, threshold=0.0)
    (row,) = summary.rows
    assert (summary.erroneous, summary.correct, summary.folds) == (2, 3, 0)
    assert summary.chance == pytest.approx(1 / 3)
    assert (row.error_accuracy, row.correct_accuracy) == (0.5, pytest.approx(2 / 3))
    assert row.f1 == pytest.approx(4 / 7)
    assert row.lowest_is_first == 0.5
    assert row.f1_low <= row.f1 <= row.f1_high
    # right steps 1, 1 | .5 .1 .3 -.1 1 1 .2 .3 .4, first wrong ones -1, .5: 11 + (4 above .5 and half of a tie) of 22
    assert row.auc == pytest.approx((11 + 4.5) / 22)


def test_no_threshold_comes_from_its_own_fold():
    """Spoil the scores of one fold: the thresholds of the others move, its own does not."""
    records = random_records(80)
    before = summarise_steps(records, folds=4).rows[0].thresholds
    from prm_search.evaluation.step_errors import _deal

    parts = _deal([r["problem"] for r in records], 4, 0)
    assert all(parts[i] == parts[i + 1] for i in range(0, 80, 2))  # solutions to one problem stay together
    assert sorted(np.bincount(parts)) == [20, 20, 20, 20]
    spoilt = [
        record(r["problem"], [s + 50 for s in r["scores"]["last"]], r["label"]) if part == 1 else r
        for r, part in zip(records, parts, strict=True)
    ]
    after = summarise_steps(spoilt, folds=4).rows[0].thresholds
    assert after[1] == before[1]
    assert all(after[i] != before[i] for i in (0, 2, 3))


def test_thresholds_from_other_records():
    records, others = random_records(60), random_records(60, seed=9)
    (row,) = summarise_steps(records, fit=others).rows
    wanted = fit_threshold([r["scores"]["last"] for r in others], [r["label"] for r in others])
    assert row.thresholds == [wanted]
    assert row.f1 == pytest.approx(f1([r["scores"]["last"] for r in records], [r["label"] for r in records], wanted))


def test_scores_that_mean_nothing_are_at_chance():
    rng = np.random.default_rng(5)
    records = [record(i, rng.normal(size=4).tolist(), int(rng.integers(-1, 4))) for i in range(600)]
    summary = summarise_steps(records)
    (row,) = summary.rows
    assert summary.chance == pytest.approx(0.25)
    assert row.lowest_low < 0.25 < row.lowest_high
    assert row.auc == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("records", "options", "word"),
    [
        ([record(0, [1.0], -1)], {}, "0 of 1"),
        ([record(0, [1.0], 0), record(1, [1.0], -1)], {"folds": 3}, "folds=3"),
        ([record(0, [1.0], 0), record(1, [1.0], -1)], {"fit": [], "threshold": 1.0}, "exclude"),
    ],
)
def test_bad_arguments(records, options, word):
    with pytest.raises(ValueError, match=word):
        summarise_steps(records, **options)


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_steps_are_scored_as_the_step_rule_cuts_them(demo_pair):
    prompt, steps = Prompt(text="=5a*7b+3c*9?"), ("a*7=5", "b+3=9", "c*9=1")
    (found,) = score_steps([Solution(prompt, steps, 1)], scorer=demo_pair, delimiter=";")
    (scores,) = demo_pair.score([prompt], [";".join(steps)], steps=ps.StepRule(";"))
    assert found["scores"]["last"] == pytest.approx(scores.step_rewards.tolist(), abs=1e-5)
    assert found["scores"]["q"] == pytest.approx(scores.q[scores.step_ends - 1].tolist(), abs=1e-5)
    by_length = scores.q[scores.step_ends - 1] / scores.step_ends
    assert found["scores"]["prefix_mean"] == pytest.approx(by_length.tolist(), abs=1e-5)
    assert (found["tokens"], found["label"]) == (12, 1)


def test_batches_and_what_is_done_change_no_record(demo_pair):
    asked = problems(5, length=3)
    solutions = [Solution(Prompt(text=p.prompt), tuple("".join(p.steps).split(";")), -1) for p in asked]
    solutions.append(solutions[0])
    whole = list(score_steps(solutions, scorer=demo_pair, delimiter=";"))
    rest = list(score_steps(solutions, scorer=demo_pair, delimiter=";", batch=1, done={1: {}, 3: {}}))
    assert [r["index"] for r in rest] == [0, 2, 4, 5]
    for each in rest:
        other = whole[each["index"]]
        assert each["problem"] == other["problem"]
        assert each["scores"]["q"] == pytest.approx(other["scores"]["q"], abs=1e-5)
    assert [r["problem"] for r in whole] == [0, 1, 2, 3, 4, 0]


def test_a_delimiter_inside_a_step_ends_none(demo_pair):
    ids, ends = encode_steps(demo_pair, ["a*7=5;b+3=8", "c*9=2"], ";", append_eos=False)
    assert (len(ids), ends) == (11, [8, 11])
    ids, ends = encode_steps(demo_pair, ["a*7=5", "b+3=8"], ";", append_eos=True)
    assert (ids[-1], ends) == (demo_pair.eos_token_id, [4, 8])


@pytest.mark.parametrize(
    ("steps", "label", "word"),
    [((), -1, "steps"), (("a", ""), -1, "steps"), (("a",), 1, "label=1"), (("a",), None, "label=None")],
)
def test_bad_solutions(steps, label, word):
    with pytest.raises(ValueError, match=word):
        Solution(Prompt(text="x"), steps, label)


def test_bad_scoring_arguments_are_named(demo_pair):
    good = Solution(Prompt(text="=5a*7?"), ("a*7=5",), -1)
    for options in ({"values": ("worst",)}, {"delimiter": ""}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            score_steps([good], scorer=demo_pair, **options)
    long = Solution(good.prompt, ("a*7=5",) * 60, -1)
    with pytest.raises(ValueError, match=r"solutions\[1\]: .*context of 128"):
        list(score_steps([good, long], scorer=demo_pair, delimiter=";"))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(workdir: Path, demo_pair: object) -> Path:
    rng = random.Random(0)
    for name, seed in (("data", 5), ("other", 6)):
        rows = []
        for i, problem in enumerate(problems(40, seed=seed, length=5)):
            text, _ = demonstrate(problem, rng)
            label = check(problem, text).first_wrong_step
            rows.append({"id": f"p{i}", "problem": problem.prompt, "steps": text.split(";"), "label": label})
        write(f"{name}.jsonl", rows)
    return workdir


COMMAND = ["eval-steps", "--pair", "demo", "--data", "data.jsonl"]


def test_command(folder, capsys):
    assert main([*COMMAND, "--out", "out"]) == 0
    records = lines("out/steps.jsonl")
    assert [r["id"] for r in records] == [f"p{i}" for i in range(40)]
    card = json.loads(Path("out/report.json").read_text())
    summary = summarise_steps(records)
    assert [row["f1"] for row in card["rows"]] == [row.f1 for row in summary.rows]
    assert [row.value for row in summary.rows] == ["last", "q", "prefix_mean"]
    assert summary.rows[0].auc > 0.8  # the shipped PRM tells wrong steps from right ones
    assert summary.rows[0].lowest_low > summary.chance
    table = capsys.readouterr().out
    assert table.strip() in Path("out/report.md").read_text()

    kept = Path("out/steps.jsonl").read_bytes()
    cut = kept[: kept.index(b"\n", len(kept) // 2) + 20]  # stopped in the middle of a line
    Path("out/steps.jsonl").write_bytes(cut)
    assert main([*COMMAND, "--out", "out"]) == 2
    assert main([*COMMAND, "--out", "out", "--resume"]) == 0
    resumed = Path("out/steps.jsonl").read_bytes()
    assert resumed.startswith(cut[: cut.rfind(b"\n") + 1])
    for got, wanted in zip(lines("out/steps.jsonl"), records, strict=True):  # a batch of another shape rounds otherwise
        scores, others = got.pop("scores"), wanted.pop("scores")
        assert got == wanted
        assert all(scores[value] == pytest.approx(others[value], abs=1e-5) for value in scores)


def test_thresholds_from_another_file_and_given_ones(folder):
    assert main([*COMMAND, "--fit", "other.jsonl", "--values", "last", "--out", "out"]) == 0
    card = json.loads(Path("out/report.json").read_text())
    (wanted,) = summarise_steps(lines("out/steps.jsonl"), fit=lines("out/fit.jsonl")).rows
    assert card["rows"][0]["thresholds"] == wanted.thresholds
    assert "chosen on other.jsonl" in Path("out/report.md").read_text()
    assert main([*COMMAND, "--threshold", "-1.5", "--values", "last", "--out", "given"]) == 0
    assert json.loads(Path("given/report.json").read_text())["rows"][0]["thresholds"] == [-1.5]
    Path("given/report.md").unlink()
    assert main(["eval-steps", "--report-only", "--out", "given"]) == 0
    assert Path("given/report.md").exists()


BAD = {
    "no pair": (["eval-steps", "--data", "data.jsonl", "--out", "out"], "--pair"),
    "no data": (["eval-steps", "--pair", "demo", "--out", "out"], "--data"),
    "no such file": (["eval-steps", "--pair", "demo", "--data", "none.jsonl", "--out", "out"], "none.jsonl"),
    "label": (
        ["eval-steps", "--pair", "demo", "--data", "label.jsonl", "--out", "out"],
        "label.jsonl, line 1: label=7",
    ),
    "steps": (["eval-steps", "--pair", "demo", "--data", "steps.jsonl", "--out", "out"], 'line 1: "steps" must be'),
    "too long": (["eval-steps", "--pair", "demo", "--data", "long.jsonl", "--out", "out"], "long.jsonl, line 2: 24"),
    "folds": ([*COMMAND, "--folds", "1", "--out", "out"], "--folds 1"),
    "values": ([*COMMAND, "--values", "worst", "--out", "out"], "--values 'worst'"),
    "threshold of two": ([*COMMAND, "--threshold", "0", "--out", "out"], "--threshold"),
    "nothing there": (["eval-steps", "--report-only", "--out", "out"], "--out out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(folder, capsys, case):
    problem = "=5a*7?"
    Path("label.jsonl").write_text(json.dumps({"problem": problem, "steps": ["a*7=5"], "label": 7}) + "\n")
    Path("steps.jsonl").write_text(json.dumps({"problem": problem, "steps": "a*7=5", "label": 0}) + "\n")
    rows = [{"problem": problem, "steps": ["a*7=5"] * n, "label": 0} for n in (1, 60)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args, word = BAD[case]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
