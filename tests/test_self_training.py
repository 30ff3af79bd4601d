"""Self-training: pseudo-labels by hand, what is held out, stops, resumes, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from records import lines, write

import prm_search as ps
from prm_search.cli import main
from prm_search.demo import pair_dir
from prm_search.demo.chains import problems
from prm_search.training.data import LabelledResponse, read_rollouts, read_unlabelled, split
from prm_search.training.pair_accuracy import pair_accuracy
from prm_search.training.recipe import Recipe
from prm_search.training.self_training import SelfTraining, _Run, self_train

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

POLICY = str(pair_dir() / "policy")
RECIPE = Recipe(learning_rate=1e-3, micro_batch=32, batch=32, holdout=0.3, epochs=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rollouts of 200 problems with labels, and of 50 others whose labels are all said to be right."""
    folder = tmp_path_factory.mktemp("rollouts")
    asked = [p for length, n in ((2, 200), (3, 50)) for p in problems(n, split="prm", length=length)]
    write(folder / "problems.jsonl", [{"question": p.prompt, "answer": p.answer} for p in asked])
    out = folder / "rollouts.jsonl"
    command = ["rollout", "--policy", "demo", "--data", str(folder / "problems.jsonl"), "--n", "4", "--label", "exact"]
    assert main([*command, "--out", str(out)]) == 0
    rows = lines(out)
    write(folder / "labelled.jsonl", rows[:800])
    write(folder / "unlabelled.jsonl", [row | {"label": 1} for row in rows[800:]] + rows[:4])
    return folder / "labelled.jsonl", folder / "unlabelled.jsonl"


def rewards(folder: Path, rows: list[Any]) -> list[float]:
    pair = ps.ImplicitPRM.from_pretrained(folder)
    return [s.reward for s in pair.score([r.prompt_ids for r in rows], [r.response_ids.tolist() for r in rows])]


def test_a_round_learns_from_what_the_pair_before_is_sure_of(tmp_path: Path, files: tuple[Path, Path]) -> None:
    labelled, unlabelled = files
    settings = SelfTraining(rounds=1, confidence=(0.3, 0.6))
    said: list[str] = []

    def stop(line: str) -> None:  # as if it had been killed behind its first round
        said.append(line)
        if line.startswith("round 0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_train(POLICY, labelled, unlabelled, tmp_path / "out", RECIPE, settings, log=stop)
    assert not (tmp_path / "out" / "pair.json").exists()
    with pytest.raises(ValueError, match="has rounds of a run: resume goes on"):
        self_train(POLICY, labelled, unlabelled, tmp_path / "out", RECIPE, settings)
    other = SelfTraining(rounds=1, confidence=(0.2, 0.6))
    with pytest.raises(ValueError, match="of other data or settings"):
        self_train(POLICY, labelled, unlabelled, tmp_path / "out", RECIPE, other, resume=True)
    card = self_train(POLICY, labelled, unlabelled, tmp_path / "out", RECIPE, settings, resume=True)
    first, *more = card["self_training"]["rounds"]
    assert len(more) == 1

    kept, held = split(read_rollouts(labelled), RECIPE.holdout)
    away = {row.prompt_ids for row in held}
    pool = [row for row in read_unlabelled(unlabelled) if row.prompt_ids not in away]
    before = rewards(tmp_path / "out" / "round-0", held)
    assert first["accuracy"] == pair_accuracy(held, before)
    calibration = ps.Calibration.fit(before, [row.label for row in held])
    sure = [calibration(reward) for reward in rewards(tmp_path / "out" / "round-0", pool)]
    wanted = [[place, p >= 0.6] for place, p in enumerate(sure) if p >= 0.6 or p <= 0.3]
    assert first["next"] == wanted
    assert {label for _, label in wanted} == {True, False}
    taught = read_rollouts(tmp_path / "out" / "round-1.jsonl")
    assert [(row.prompt_ids, row.label) for row in taught] == [
        *((row.prompt_ids, row.label) for row in kept),
        *((pool[place].prompt_ids, label) for place, label in wanted),
    ]
    best = card["self_training"]["best"]
    assert best == int(more[0]["accuracy"] > first["accuracy"])
    assert rewards(tmp_path / "out", held) == rewards(tmp_path / "out" / f"round-{best}", held)
    with pytest.raises(ValueError, match="holds a pair already"):
        self_train(POLICY, labelled, unlabelled, tmp_path / "out", RECIPE, settings, resume=True)


@pytest.mark.parametrize(
    ("accuracies", "ended", "over"),
    [
        ([], None, False),
        ([0.5], None, False),
        ([0.5], "no response is confident", True),
        ([0.5, 0.6], None, False),
        ([0.5, 0.5], None, True),
        ([0.5, 0.6, 0.55], None, True),
        ([0.5, 0.6, 0.7], None, False),
        ([0.5, 0.6, 0.7, 0.8], None, True),
    ],
)
def test_it_stops_by_rounds_by_the_held_out_pairs_or_where_nothing_is_left(
    accuracies: list[float], ended: str | None, over: bool
) -> None:
    run = _Run("m", Path(), RECIPE, SelfTraining(rounds=3), [], [], [], {}, None, None)
    run.rounds = [{"accuracy": accuracy} for accuracy in accuracies]
    if ended is not None:
        run.rounds[-1]["ended"] = ended
    assert run._over() is over


def test_a_pair_that_cannot_tell_right_from_wrong_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = [LabelledResponse((1,), [2], True), LabelledResponse((1,), [3], False)]
    monkeypatch.setattr(_Run, "_rewards", lambda self, folder: [0.0, 1.0, 5.0])
    (tmp_path / "round-0").mkdir()
    (tmp_path / "round-0" / "pair.json").write_text("{}")
    run = _Run("m", tmp_path, RECIPE, SelfTraining(), held, held, [LabelledResponse((4,), [2], False)], {}, None, None)
    figures = run._round(0)
    assert (figures["accuracy"], figures["next"]) == (0.0, [])
    assert figures["ended"].startswith("held-out rewards: values: wrong responses have the higher ones")


def test_the_command_passes_its_options_on_and_says_each_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def trained(*given: Any, **options: Any) -> dict[str, Any]:
        calls.append((given, options))
        rounds = [{"accuracy": 0.6}, {"accuracy": 0.75}, {"accuracy": 0.7}]
        return {"data": {"items": 9}, "self_training": {"rounds": rounds, "best": 1}}

    monkeypatch.setattr("prm_search.training.self_training.self_train", trained)
    command = ["train", "--model", "demo", "--rollouts", "l.jsonl", "--unlabelled", "u.jsonl", "--rounds", "2"]
    assert main([*command, "--confidence", "0.2,0.8", "--holdout", "0.4", "--out", "prm", "--resume"]) == 0
    ((given, options),) = calls
    assert given == (POLICY, "l.jsonl", "u.jsonl", "prm", Recipe(holdout=0.4), SelfTraining(2, (0.2, 0.8)))
    assert options["resume"] is True
    said = capsys.readouterr().err
    assert "prm: trained on 9 items in round 1 of 2; held-out pair accuracy by round 0.600, 0.750, 0.700" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--rounds", "2"], "--rounds is of self-training: --unlabelled names the responses"),
        (["--confidence", "0.1,0.9"], "--confidence is of self-training"),
        (["--unlabelled", "u.jsonl", "--confidence", "0.1"], "--confidence 0.1: two numbers with a comma"),
        (["--unlabelled", "u.jsonl", "--confidence", "0.9,0.1"], "confidence=(0.9, 0.1): low < high"),
        (["--unlabelled", "u.jsonl", "--confidence", "0,0.9"], "confidence: low=0.0: a probability in (0, 1)"),
        (["--unlabelled", "u.jsonl", "--rounds", "0"], "rounds=0"),
        (["--unlabelled", "none.jsonl"], "none.jsonl"),
        (["--unlabelled", "bad.jsonl"], "bad.jsonl, line 1: no rollout"),
        (["--unlabelled", "u.jsonl", "--holdout", "0"], "have 0 pairs of a right and a wrong response"),
    ],
)
def test_bad_command_lines_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: tuple[Path, Path],
    changed: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("u.jsonl").write_text(files[1].read_text())
    Path("bad.jsonl").write_text('{"prompt_ids": [1]}\n')
    assert (
        main(["train", "--model", "demo", "--rollouts", str(files[0]), "--out", "o", "--holdout", "0.4", *changed]) == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not Path("o").exists()
