"""`make report`: stages run once, tables hold what they say, step errors by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "method"
RESULTS = FOLDER.parent / "results" / "method"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("method")


def report(made: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: its modules import each other by bare name."""
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / "report.py"),
            "--quick",
            "--work",
            str(made / "w"),
            "--out",
            str(made / "o"),
            *args,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_every_stage_runs_once_and_the_tables_are_made_of_them(made):
    first = report(made, "--seeds", "1")
    stages = sorted((made / "w" / "seed-1" / "stages").iterdir())
    assert len([line for line in first.stderr.splitlines() if line.startswith("[seed 1")]) >= len(stages)
    assert not (made / "o").exists()  # one seed makes no tables
    before = {path: path.stat().st_mtime_ns for path in stages}
    second = report(made)
    assert "[seed" not in second.stderr
    assert {path: path.stat().st_mtime_ns for path in (made / "w" / "seed-1" / "stages").iterdir()} == before

    found = json.loads((made / "o" / "report.json").read_text())
    assert [each["pair"] for each in found["objectives"][:5]] == ["ce", "dpo", "kto", "nca", "ipvrm"]
    cells = {(each["problems"], each["responses"]) for each in found["sweep"]}
    assert cells == {(8, 1), (8, 2), (40, 1), (40, 2)}
    rollouts = made / "w" / "seed-1" / "rollouts.jsonl"
    assert found["seeds"]["1"]["training"]["ce"]["data"]["responses"] == len(rollouts.read_text().splitlines())
    assert {each["infer"] for each in found["reference"]} == {"with", "without"}
    page = (made / "o" / "report.md").read_text()
    assert set(re.findall(r"\]\((\w+\.png)\)", page)) == {path.name for path in (made / "o").glob("*.png")}


SCRIPT = """
import json, sys
from localise import Steps, fitted, localisation, scores
one = Steps(0, [1.0, -2.0, 0.5], [False, True, False])
late = Steps(0, [1.0, -1.0, -2.0], [False, True, True])
good = Steps(0, [1.0, 0.4, 0.3], [False, False, False])
odd = [Steps(1, step.rewards, step.wrong) for step in (one, late, good)]
low = [Steps(1, [9.0, 9.0, -5.0], [False, True, False]), good]
print(json.dumps([
    [each.first for each in (one, late, good)],
    [one.found(0.0), late.found(-1.5), good.found(0.0)],
    [scores([one, late, good], t) for t in (0.0, -1.5, 0.35)],
    fitted([one, late, good]),
    localisation([one, late, good, *odd]),
    localisation([one, *low])["f1"],
]))
"""


def test_step_errors_by_hand():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=FOLDER, check=True)
    first, found, scored, threshold, whole, misled = json.loads(done.stdout)
    assert first == [1, 1, -1]
    assert found == [1, 2, -1]
    assert scored == [[1.0, 1.0, 1.0], [pytest.approx(2 / 3), 0.5, 1.0], [0.0, 1.0, 0.0]]
    assert -1.0 < threshold <= 0.3
    assert (whole["f1"], whole["lowest_is_an_error"], whole["single_error_found"]) == (1, 1, 1)
    assert whole["chance_of_an_error"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert whole["chance_of_a_single_error"] == pytest.approx(1 / 3)
    assert misled == 0  # a fold without right responses has no F1, and its threshold finds nothing in the other


def test_the_report_that_is_committed_is_whole():
    """The page is that of the figures beside it: it was not edited by hand."""
    code = (
        "import json, sys; from page import markdown; from protocol import Protocol; from pathlib import Path;"
        "folder = Path(sys.argv[1]); r = json.loads((folder / 'report.json').read_text());"
        "sys.stdout.write(markdown(r, Protocol(), sorted(path.name for path in folder.glob('*.png'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(RESULTS)], capture_output=True, text=True, cwd=FOLDER, check=True
    )
    assert done.stdout == (RESULTS / "report.md").read_text()
