"""Calibration against formulas and plain computations; votes, ensembles and the command that read it; bad input."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import RULE, FakePolicy, FakeScorer

import prm_search as ps
from prm_search.answers import select
from prm_search.cli import main
from prm_search.evaluation.reliability import cross_fitted, reliability
from prm_search.tree import Prompt
from prm_search.values import along

pytest.importorskip("sklearn")


def drawn(n: int = 400, seed: int = 3) -> tuple[list[float], list[bool]]:
    """Values whose true probability of being right is sigmoid(2 x - 1)."""
    rng = random.Random(seed)
    values = [rng.uniform(-3, 3) for _ in range(n)]
    return values, [rng.random() < 1 / (1 + math.exp(1 - 2 * x)) for x in values]


def loss(slope: float, offset: float, values: list[float], labels: list[bool]) -> float:
    """Platt's objective, written out."""
    right = sum(labels)
    high, low = (right + 1) / (right + 2), 1 / (len(labels) - right + 2)
    total = 0.0
    for value, label in zip(values, labels, strict=True):
        p = 1 / (1 + math.exp(-(slope * value + offset)))
        t = high if label else low
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total


def test_platt_is_the_minimum_of_its_objective() -> None:
    values, labels = drawn()
    made = ps.Calibration.fit(values, labels)
    best = loss(made.slope, made.offset, values, labels)
    for ds, do in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(made.slope + ds, made.offset + do, values, labels) > best
    assert (made.responses, made.right) == (400, sum(labels))
    assert made(0.3) == pytest.approx(1 / (1 + math.exp(-(made.slope * 0.3 + made.offset))))
    assert made(made.threshold(0.9)) == pytest.approx(0.9)
    assert (made(-1e6), made(1e6)) == pytest.approx((0.0, 1.0))
    shifted = ps.Calibration.fit([1000 + 5000 * value for value in values], labels)  # the unit plays no part
    assert shifted(1000 + 5000 * 0.3) == pytest.approx(made(0.3), abs=1e-6)


def test_few_separated_responses_give_no_certainty() -> None:
    made = ps.Calibration.fit([-1.0, -1.0, 1.0, 1.0], [False, False, True, True])
    assert made(1.0) == pytest.approx(0.75, abs=1e-4)  # (2 + 1) / (2 + 2)


def test_isotonic_pools_adjacent_violators() -> None:
    made = ps.Calibration.fit([0, 1, 2, 3, 4, 5], [False, True, False, True, False, True], method="isotonic")
    assert [made(x) for x in (0, 1, 2, 3, 4, 5)] == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 1])
    assert made(0.5) == pytest.approx(0.25)
    assert (made(-9), made(9)) == (0.0, 1.0)
    assert made.threshold(0.25) == pytest.approx(0.5)
    assert made.threshold(0.5) == pytest.approx(1.0)
    assert made.log_odds(9) == pytest.approx(math.log((1 - 1e-6) / 1e-6))


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_file_keeps_it(tmp_path: Path, method: Any) -> None:
    made = ps.Calibration.fit(*drawn(), method=method, value="min")
    made.save(tmp_path / "c.json")
    assert ps.Calibration.load(tmp_path / "c.json") == made


def test_votes_weigh_by_the_probability_and_searches_rank_by_it() -> None:
    made = ps.Calibration("platt", "last", slope=2.0, offset=-1.0)
    value = ps.Calibrated(made)
    (result,) = ps.search(
        ["q"], policy=FakePolicy(), scorer=FakeScorer(), strategy=ps.BestOfN(4), steps=RULE, value=value, select="best"
    )
    assert result.node.value == pytest.approx(2 * result.node.reward - 1)
    chosen = select(result.candidates, "weighted", weight="sigmoid")
    by_hand: dict[str, float] = {}
    for node in result.candidates:
        text = node.path_text().strip()
        if not text:  # it abstains
            continue
        by_hand[text] = by_hand.get(text, 0) + node.count * made(node.reward)
    assert {vote.answer: vote.weight for vote in chosen.votes} == pytest.approx(by_hand)


@pytest.mark.parametrize("file", [False, True])
def test_ensembles_take_it_as_a_scale(tmp_path: Path, file: bool) -> None:
    made = ps.Calibration("platt", slope=2.0, offset=-1.0)
    made.save(tmp_path / "c.json")
    ensemble = ps.Ensemble([FakeScorer(name="pair")], scales={"pair": str(tmp_path / "c.json") if file else made})
    (result,) = ps.search(["q"], policy=FakePolicy(), scorer=ensemble, steps=RULE)
    for node in result.node.path():
        assert node.reward == pytest.approx(made(node.reward_of("pair")))


def test_cross_fitted_probabilities_come_from_other_problems() -> None:
    values, labels = drawn(60)
    problems = [place // 3 for place in range(60)]
    crossed = cross_fitted(values, labels, problems, folds=4, seed=1)
    dealt = np.random.default_rng(1).permutation(20) % 4
    place = 7
    rest = [i for i in range(60) if dealt[problems[i]] != dealt[problems[place]]]
    other = ps.Calibration.fit([values[i] for i in rest], [labels[i] for i in rest])
    assert crossed[place] == other(values[place])
    with pytest.raises(ValueError, match="folds=21: an integer from 2 to the number of problems, 20"):
        cross_fitted(values, labels, problems, folds=21)


def test_reliability_is_worked_out_by_hand() -> None:
    found = reliability([0.9, 0.1, 0.3, 0.7], [True, False, False, False], bins=2)
    assert [(one.predicted, one.right, one.count) for one in found.bins] == [
        (pytest.approx(0.2), 0.0, 2),
        (pytest.approx(0.8), 0.5, 2),
    ]
    assert found.error == pytest.approx((2 * 0.2 + 2 * 0.3) / 4)
    assert found.brier == pytest.approx((0.01 + 0.01 + 0.09 + 0.49) / 4)
    assert found.base_brier == pytest.approx(0.25 * 0.75)


def files(tmp_path: Path) -> tuple[Path, Path]:
    """Scored responses, as `score` writes them of pairs and of step scorers, and their labels."""
    rng = random.Random(1)
    scores, labels = [], []
    for place, (value, label) in enumerate(zip(*drawn(80), strict=True)):
        steps = [rng.uniform(-1, 1), value]
        name = "step_rewards" if place % 2 else "step_scores"
        scores.append({"index": place, "reward": value, name: steps, "step_ends": [2, 5]})
        labels.append({"problem": place // 4, "response": "x", "label": int(label)})
    paths = tmp_path / "scores.jsonl", tmp_path / "rollouts.jsonl"
    for path, records in zip(paths, (reversed(scores), labels), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return paths


def test_the_command_fits_measures_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    scores, labels = files(tmp_path)
    out, plot = tmp_path / "new" / "c.json", tmp_path / "plot.png"
    command = ["calibrate", "--scores", str(scores), "--labels", str(labels), "--out", str(out), "--plot", str(plot)]
    assert main([*command, "--bins", "4"]) == 0
    values, right = drawn(80)
    assert ps.Calibration.load(out)(0.5) == pytest.approx(ps.Calibration.fit(values, right)(0.5))
    assert plot.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 5
    assert "of 20 problems: calibration error 0." in printed.err
    assert main([*command, "--value", "min", "--method", "isotonic"]) == 0
    made = ps.Calibration.load(out)
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    steps = [along("min", line.get("step_scores", line.get("step_rewards")), [2, 5])[-1] for line in lines]
    wanted = ps.Calibration.fit(steps, [right[line["index"]] for line in lines], method="isotonic", value="min")
    assert made == wanted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--method": "linear"}, "--method"),
        ({"--value": "most"}, "--value"),
        ({"--folds": "21"}, "--folds: folds=21: an integer from 2 to the number of problems, 20"),
        ({"--labels": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"--scores": "rollouts.jsonl"}, "rollouts.jsonl, line 1: index None"),
        ({"--labels": "scores.jsonl"}, 'scores.jsonl, line 80: "label" is None: 0 or 1 is needed'),
    ],
)
def test_bad_command_lines_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, str],
    message: str,
) -> None:  # fmt: skip
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {"--scores": "scores.jsonl", "--labels": "rollouts.jsonl", "--out": "c.json"} | changed
    assert main(["calibrate", *(word for pair in given.items() for word in pair)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not Path("c.json").exists()


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 of 2 are right"):
        ps.Calibration.fit([1, 2], [True, True])
    with pytest.raises(ValueError, match="wrong responses have the higher ones"):
        ps.Calibration.fit([2.0, 1.0, 2.0, 1.0], [False, True, False, True])
    with pytest.raises(ValueError, match=r"values\[1\] is not finite"):
        ps.Calibration.fit([1, math.inf], [True, False])
    with pytest.raises(ValueError, match="method='linear'"):
        ps.Calibration.fit([1, 2], [False, True], method="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="corners of a rising map"):
        ps.Calibration("isotonic", x=(0.0, 1.0), y=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"the highest that a value has is 0\.5"):
        ps.Calibration("isotonic", x=(0.0, 1.0), y=(0.2, 0.5)).threshold(0.6)
    with pytest.raises(TypeError, match=r"calibration=0\.5: a Calibration is needed"):
        ps.Calibrated(0.5)  # type: ignore[arg-type]
    path = tmp_path / "c.json"
    for text in ("[]", '{"format": 2}', '{"format": 1, "method": "platt", "beta": 1}', '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"c\.json: no calibration"):
            ps.Calibration.load(path)


def test_rollouts_are_scored_as_they_were_drawn_and_calibrated(tmp_path: Path) -> None:
    """The way of docs/scoring.md, on the demo's pair."""
    from prm_search.demo import chains, pair_dir

    prompt = "=5a*7b+3?"
    pair = ps.ImplicitPRM.from_pretrained(pair_dir())
    texts = ["a*7=5;b+3=8", "a*7=5;b+3=9", "a*7=6;b+3=9", "a*7=5;b+3=8"]
    ids = [pair.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [
        {
            "problem": i % 2,
            "prompt_ids": list(pair.encode_prompt(Prompt(text=prompt))),
            "response_ids": row,
            "label": i % 2,
        }
        for i, row in enumerate(ids)
    ]
    rollouts, scores = tmp_path / "rollouts.jsonl", tmp_path / "scores.jsonl"
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = ["--delimiter", chains.DELIMITER]
    assert main(["score", "--pair", "demo", "--data", str(rollouts), "--out", str(scores), *steps]) == 0
    records = [json.loads(line) for line in scores.read_text().splitlines()]
    wanted = pair.score([prompt] * 4, ids, steps=ps.StepRule(chains.DELIMITER))
    assert [record["token_ids"] for record in records] == ids
    assert [record["reward"] for record in records] == pytest.approx([s.reward for s in wanted], abs=1e-5)
