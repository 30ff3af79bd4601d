"""`make report`: stages run once, tables hold what they say, step errors by hand."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "method"
RESULTS = FOLDER.parent / "results" / "method"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The script's command line, in this process. Its modules import each other by bare name, and go again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", "--quick", *map(str, args)])
        return int(importlib.import_module("report").main())

    yield call
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and FOLDER in Path(str(sys.modules[name].__file__)).parents:
            del sys.modules[name]


@pytest.mark.slow
def test_every_stage_runs_once_and_the_tables_are_made_of_them(report, tmp_path, capsys):
    work, out = tmp_path / "w", tmp_path / "o"
    assert report("--work", work, "--out", out, "--seeds", 1) == 0
    stages = sorted((work / "seed-1" / "stages").iterdir())
    assert capsys.readouterr().err.count("[seed 1,") >= len(stages)
    assert not out.exists()  # one seed by itself makes no tables
    before = {path: path.stat().st_mtime_ns for path in stages}
    assert report("--work", work, "--out", out) == 0
    assert "[seed" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (work / "seed-1" / "stages").iterdir()} == before

    found = json.loads((out / "report.json").read_text())
    assert [each["pair"] for each in found["objectives"][:5]] == ["ce", "dpo", "kto", "nca", "ipvrm"]
    cells = {(each["problems"], each["responses"]) for each in found["sweep"]}
    assert cells == {(8, 1), (8, 2), (40, 1), (40, 2)}
    lines = (work / "seed-1" / "rollouts.jsonl").read_text().splitlines()
    assert found["seeds"]["1"]["training"]["ce"]["data"]["responses"] == len(lines) == 80
    assert {each["infer"] for each in found["reference"]} == {"with", "without"}
    page = (out / "report.md").read_text() + (out / "strategies.md").read_text()
    assert "| best of n | 4 samples |" in page
    assert "| tune | 64 tokens |" in page
    assert set(re.findall(r"\]\((\w+\.png)\)", page)) == {path.name for path in out.glob("*.png")}


SCRIPT = """
import json
from localise import Steps, localisation, shuffled
kinds = [([1.0, -2.0, 0.5], [False, True, False]), ([1.0, -1.0, -2.0], [False, True, True])]
kinds.append(([1.0, 0.4, 0.3], [False] * 3))
known = [Steps(k, rewards, wrong) for k in range(5) for rewards, wrong in kinds]
dealt = shuffled(known)
print(json.dumps([
    [each.label for each in known[:3]],
    localisation(known),
    sorted(r for each in dealt for r in each.rewards) == sorted(r for each in known for r in each.rewards),
    [each.rewards for each in dealt] != [each.rewards for each in known],
    localisation(known[2:3]),
]))
"""


def test_step_errors_by_hand():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=FOLDER, check=True)
    labels, whole, same, other, one = json.loads(done.stdout)
    assert labels == [1, 1, -1]
    assert [whole[name] for name in ("f1", "first_wrong", "right_passed", "auc")] == [1, 1, 1, 1]
    assert (whole["lowest_is_wrong"], whole["only_error_found"], whole["responses"]) == (1, 1, 15)
    assert whole["chance"]["lowest_is_wrong"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert whole["chance"]["only_error_found"] == pytest.approx(1 / 3)
    assert whole["chance"]["f1"] < 1
    assert same
    assert other
    assert (one["f1"], one["lowest_is_wrong"]) == (0, 0)  # nothing to find


EQUAL = """
import json
from strategies import equal
def line(name, size, cost, right):
    return {"name": name, "size": size, "policy": cost, "total": 2 * cost, "seconds": 1.0, "right": [right]}
plain = line("best of n", 16, 512.0, [1.0, 0.0, 0.0, 1.0])
lines = [plain, line("beam", 8, 256.0, [0.0, 0.0, 1.0, 1.0]), line("beam", 32, 1024.0, [1.0, 0.0, 1.0, 1.0])]
lines += [line("short", 16, 300.0, [0.0] * 4), line("dear", 4, 600.0, [1.0] * 4), line("near", 16, 515.0, [1.0] * 4)]
lines.append(line("near", 8, 300.0, [0.0] * 4))
print(json.dumps({each["name"]: each for each in equal(lines, "policy", plain)}))
"""


def test_costs_are_made_equal_by_mixtures_of_two_sizes():
    done = subprocess.run([sys.executable, "-c", EQUAL], capture_output=True, text=True, cwd=FOLDER, check=True)
    found = json.loads(done.stdout)
    assert set(found) == {"best of n", "beam", "short", "near"}  # the smallest size of "dear" costs too much
    beam = found["beam"]
    assert (beam["sizes"], beam["w"], beam["policy"], beam["total"]) == ([8, 32], pytest.approx(1 / 3), 512, 1024)
    assert beam["accuracy"] == pytest.approx((1 / 3 + 0 + 1 + 1) / 4)
    assert beam["difference"] == pytest.approx(beam["accuracy"] - 0.5)
    assert (found["short"]["sizes"], found["short"]["policy"]) == ([16], 300)
    assert (found["near"]["sizes"], found["near"]["accuracy"]) == ([16], 1.0)  # within 2 % of the limit


def test_the_strategies_page_has_the_figures_beside_it():
    code = (
        "import json, sys; from strategies import _page; from protocol import Protocol; from pathlib import Path;"
        "r = json.loads((Path(sys.argv[1]) / 'strategies.json').read_text());"
        "sys.stdout.write(_page(r, Protocol(), 'strategies.png'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(RESULTS)], capture_output=True, text=True, cwd=FOLDER, check=True
    )
    assert done.stdout == (RESULTS / "strategies.md").read_text()


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


def test_the_shipped_pair_is_made_as_the_reports_pairs_are():
    code = (
        "from protocol import Protocol; from prm_search.demo import make; p = Protocol();"
        "assert p.runs(3)[0].recipe == make.prm_recipe(3); assert p.arguments == make.ARGUMENTS;"
        "assert (p.lengths, p.responses) == (make.LENGTHS, make.RESPONSES)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)
