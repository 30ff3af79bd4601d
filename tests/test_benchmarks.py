"""Every benchmark suite runs, says what it promises to say, and its rivals compute what ours computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.slow


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the suites import their siblings by bare name."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        cwd=FOLDER,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    run("report.py", "--suite", "host,kernels,engine,search,step-prms", "--quick", "--out", str(out))
    return out


@pytest.fixture(scope="module")
def report(folder) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_report_names_its_machine_and_its_ceilings(report):
    assert report["quick"] is True
    assert {"device", "name", "threads", "versions"} <= set(report["machine"])
    assert report["ceilings"]["flops"] > 0
    assert report["ceilings"]["bandwidth"] > 0
    assert {suite: list(tables) for suite, tables in report["suites"].items()} == {
        "host": ["host"],
        "kernels": ["ops"],
        "engine": ["scoring", "decoding", "steering", "memory"],
        "search": ["searching", "best_of"],
        "step-prms": ["step_prms"],
    }


def test_the_decode_loop_is_compared_with_generate(report):
    (row,) = report["suites"]["host"]["host"]
    assert set(row["us_a_row_and_token"]) == {"ours", "generate"}
    assert row["ours_over_generate"] > 0


def test_best_of_n_is_compared_with_generate(report):
    (row,) = report["suites"]["search"]["best_of"]
    assert set(row["seconds"]) == {"ours", "generate"}
    assert row["generate_over_ours"] > 0


def test_a_step_prms_tokens_are_question_steps_and_markers_once(report):
    (row,) = report["suites"]["step-prms"]["step_prms"]
    begin = 30 + 12 + 8  # words of the question, of the system message, and of the template before the first step
    a_step, fan, levels = 8 + 1, 16, row["steps"]
    assert row["tokens"]["ours"] == begin + levels * fan * a_step
    assert row["tokens"]["whole_texts"] == sum(fan * (begin + level * a_step) for level in range(1, levels + 1))
    assert row["largest_difference"] < 1e-3


def test_every_op_and_its_rivals_agree_with_float64(report):
    rows = report["suites"]["kernels"]["ops"]
    assert {row["op"] for row in rows} == {
        "linear_logprob", "guide_logits", "sample_rows", "tree_attention", "write_kv"
    }  # fmt: skip
    # bf16 operands round logits (0.1 nat, and a guided logit of up to 40 by a quarter); fp32 hardly does
    rivals, ours = (0.3, 0.3) if report["machine"]["device"] == "cuda" else (1e-4, 1e-4)
    for row in rows:
        assert row["bound"] in ("flop", "bytes")
        present = {name: way for name, way in row["ways"].items() if "absent" not in way}
        assert "ours" in present
        assert len(present) >= 2, f"{row['op']} has no rival"
        for name, way in present.items():
            assert way["ms"] > 0
            assert way["share_of_floor"] == pytest.approx(row["floor_ms"] / way["ms"])
            assert ("error_max" in way) == (name not in ("matmul", "multinomial"))
            assert way.get("error_max", 0.0) <= (ours if name == "ours" else rivals), (row["op"], name)
            assert {"peak_bytes", "largest_tensor_bytes"} & set(way)


def test_the_head_is_compared_with_what_the_issue_names(report):
    row = next(row for row in report["suites"]["kernels"]["ops"] if row["op"] == "linear_logprob")
    assert {"ours", "matmul", "eager", "two_kernels", "compiled_eager", "trl", "liger"} <= set(row["ways"])
    assert "absent" not in row["ways"]["eager"]
    assert "absent" not in row["ways"]["two_kernels"]
    for way in row["ways"].values():
        assert way.get("absent", "a reason")


def test_scoring_rivals_agree_and_the_tree_holds_less(report):
    (row,) = report["suites"]["engine"]["scoring"]
    more = {"ours_streams"} if report["machine"]["device"] == "cuda" else set()
    assert set(row["largest_difference"]) == {"naive", "prompt_cached", "dynamic_cache", *more} == set(row["over_ours"])
    bound = 1e-2 if report["machine"]["device"] == "cuda" else 1e-5  # beta * nats
    assert max(row["largest_difference"].values()) < bound
    assert row["kv_tokens"]["live"] <= row["kv_tokens"]["ours_held"] < row["kv_tokens"]["copies"]
    assert row["encoded_tokens"]["ours"] < row["encoded_tokens"]["prompt_cached"] < row["encoded_tokens"]["naive"]
    assert row["share_of_floor"] > 0
    for held in report["suites"]["engine"]["memory"]:
        size = held["kv_bytes"]
        assert size["tree_shared"] < size["prompt_shared"] < size["copies"]
    (decoding,) = report["suites"]["engine"]["decoding"]
    assert decoding["over_weight_floor"] > 0
    cuda = report["machine"]["device"] == "cuda"
    assert decoding["step"].startswith("graph" if cuda else "packed: the model is on cpu")
    assert (decoding["no_graph_over_ours"] is not None) == cuda
    (steering,) = report["suites"]["engine"]["steering"]
    more = {"plain, no graph", "steered, no graph", "steered, streams"} if cuda else set()
    assert set(steering["ms"]) == set(steering["over_weight_floor"]) == {"plain", "steered", *more}


def test_the_search_suite_has_the_first_step_and_the_full_text_rival(report):
    rows = {row["way"]: row for row in report["suites"]["search"]["searching"]}
    beams = {name for name in rows if name.startswith("beam")}
    assert {name.partition("/")[2] for name in beams} == {"shared", "separate", "full_text"}
    for name in beams:
        assert rows[name]["first_step_seconds"] > 0
        assert rows[name]["scorer_over_policy_seconds"] > 0
    full = next(rows[name] for name in beams if name.endswith("full_text"))
    ours = next(rows[name] for name in beams if name.endswith("separate"))
    assert full["largest_difference"] < (1e-2 if report["machine"]["device"] == "cuda" else 1e-5)
    assert full["encoded_tokens"]["prm"] > 2 * ours["encoded_tokens"]["prm"]


def test_the_markdown_says_that_it_was_a_rehearsal_without_a_gpu(folder, report):
    text = (folder / "report.md").read_text()
    assert "A rehearsal" in text
    assert ("No GPU" in text) == (report["machine"]["device"] == "cpu")
    for suite, tables in report["suites"].items():
        assert f"## {suite}" in text
        assert all(f"### {table}" in text for table in tables)


CHECK = """
import torch
from gather_kernel import gather_logprob
torch.manual_seed(0)
logits = 4 * torch.randn(3, 9001) - 50
logits[0, :5000] = -torch.inf  # more than a block
targets = torch.tensor([8000, 5, 9000])
exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
print((gather_logprob(logits, targets) - exact).abs().max().item())
"""


def test_the_second_kernel_of_the_rival_path_is_right():
    pytest.importorskip("triton")
    assert float(run("-c", CHECK, TRITON_INTERPRET="1").stdout) < 1e-5


# By hand: beams 0 and 3 survive step 0, two children each: 10 of the prompt, 2 x 5 of step 0, 4 x 5 of step 1.
LIVE = """
from scoring import Work
work = Work([0] * 10, [[0] * 4, [0, 0, 3, 3]], [[[1] * 5] * 4, [[2] * 5] * 4])
print(work.live(0), work.live(1), work.most_live(), work.copied())
"""


def test_live_tokens_are_those_of_distinct_path_nodes():
    assert run("-c", LIVE).stdout.split() == ["30", "40", "40", "80"]


REHEARSAL = """
import json, sys
import gpu_run, report
whole = gpu_run.stages
print(json.dumps([stage.name for stage in whole(gpu_run.Path("lines"))]))
command = (sys.executable, str(gpu_run.TESTS / "pretend_cuda.py"))
gpu_run.stages = lambda lines: [gpu_run.Stage("everything", 1.0, ((*command, str(lines)),))]
sys.argv = ["report.py", "--suite", "gpu", "--minutes", "100", "--out", sys.argv[1]]
report.main()
"""
# What the machine of the run lacks.
ABSENT = ("matplotlib", "pytest_benchmark", "hypothesis", "peft", "trl", "typer", "rich", "fastapi", "openai", "ray")
BARE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[list[str], Path, list[dict[str, Any]]]:
    """Every stage of the GPU run but its tests, as on CUDA, in one process: (names of the stages, folder, lines)."""
    folder = tmp_path_factory.mktemp("gpu")
    folder.joinpath("sitecustomize.py").write_text(BARE)
    done = run("-c", REHEARSAL, str(folder), PYTHONPATH=str(folder))
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[0]), folder, lines


def test_every_stage_of_the_gpu_run_is_rehearsed_in_a_bare_environment(rehearsed):
    names, folder, lines = rehearsed
    assert names == ["correctness", "ops", "decoding", "scoring", "host", "searching"]
    assert lines[-1]["stage"] == "everything"
    assert lines[-1]["ends"][0]["code"] == 0, (folder / "everything.log").read_text()[-4000:]
    assert [line for line in lines if "failed" in line or "skipped" in line] == []
    counted = Counter(line["table"] for line in lines if "line" in line)
    assert counted == {"ops": 7, "decoding": 3, "scoring": 2, "host": 1, "searching": 7}


def test_the_rehearsal_takes_the_branches_of_a_gpu(rehearsed):
    _, _, lines = rehearsed
    tables = {table: [line["line"] for line in lines if line.get("table") == table] for table in ("ops", "scoring")}
    assert all(row["dtype"] == "bfloat16" for row in tables["ops"])
    assert all("peak_bytes" in way for row in tables["ops"] for way in row["ways"].values() if "ms" in way)
    assert all("ours_streams" in row["over_ours"] for row in tables["scoring"])
    assert all(row["no_graph_over_ours"] for row in (x["line"] for x in lines if x.get("table") == "decoding"))
    (calls,) = [line["calls"] for line in lines if "calls" in line]
    assert {"own_stream True", "own_stream False", "synchronize None"} <= set(calls)
    assert sum(call.startswith("sleep") for call in calls) == 1  # the device waits until an op's launches are queued


def test_the_gpu_runs_searches_are_all_ways_and_the_most_telling_first(rehearsed):
    _, _, lines = rehearsed
    ways = [line["line"]["way"] for line in lines if line.get("table") == "searching"]
    assert ways[:3] == ["plain_1", "plain_8", "beam_2x4/shared"]
    assert sorted(ways[3:]) == ["beam_2x4/full_text", "beam_2x4/separate", "best_of_8/separate", "best_of_8/shared"]


def test_the_gpu_runs_report_is_written(rehearsed):
    _, folder, _ = rehearsed
    tables = json.loads((folder / "report.json").read_text())["suites"]["gpu"]
    text = (folder / "report.md").read_text()
    assert list(tables) == ["ops", "decoding", "scoring", "host", "searching"]
    assert all(f"### {table}" in text for table in tables)


GPU_RUN = """
import sys
from pathlib import Path
import gpu_run
folder = Path(sys.argv[1])

def stage(name, *codes):
    return gpu_run.Stage(name, 0.3, tuple((sys.executable, "-c", code) for code in codes))

line = f"import sys; sys.path.insert(0, 'benchmarks'); import gpu_run, pathlib; path = pathlib.Path({str(folder)!r})"
line += "; gpu_run.append(path / 'lines.jsonl', {'table': 'host', 'line': {}})"
gpu_run.stages = lambda lines: [
    stage("dies", "import os; print('last words', flush=True); os.abort()"),
    stage("measures", line),
]
if sys.argv[2] == "hang":
    print(gpu_run._together(stage("hangs", "import time; time.sleep(1000)"), 1.5, folder)[0]["code"])
else:
    gpu_run.run(folder, float(sys.argv[2]))
"""


def test_no_stage_of_the_gpu_run_stops_the_next(tmp_path):
    run("-c", GPU_RUN, str(tmp_path), "100")
    dies, measured, measures = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert dies["ends"][0]["code"] not in (0, None)
    assert "last words" in dies["ends"][0]["last"]
    assert measured["table"] == "host"
    assert measures["ends"][0]["code"] == 0


def test_a_stage_that_hangs_is_killed(tmp_path):
    assert run("-c", GPU_RUN, str(tmp_path), "hang").stdout.strip() == "None"


def test_a_gpu_run_without_time_begins_nothing(tmp_path):
    run("-c", GPU_RUN, str(tmp_path), "0.0001")
    ends = [json.loads(line)["ends"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert ends == [[{"skipped": "no time was left"}]] * 2
