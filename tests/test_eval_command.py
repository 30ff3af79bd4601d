"""prm-search eval: what it writes, what it says of bad input, and a run that is killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import AFTER_RECORDS, held, python
from records import lines, same, untimed, write

from prm_search.cli import main
from prm_search.commands.responses import read_responses
from prm_search.demo import pair_dir
from prm_search.demo.chains import problems

ASKED = problems(6, length=3)
ANSWER = "prm_search.demo.chains:answer"
JUDGED = ["--label", "exact", "--answer", ANSWER]
MODELS = ["--policy", "demo", "--pair", "demo", *JUDGED]
COMMAND = ["eval", *MODELS, "--data", "test.jsonl", "--budgets", "1,4", "--seeds", "0,3"]


@pytest.fixture
def folder(workdir: Path, demo_models: object) -> Path:
    write("test.jsonl", [{"id": i, "question": p.prompt, "answer": p.answer} for i, p in enumerate(ASKED)])
    return workdir


def test_command(folder, capsys):
    assert main([*COMMAND, "--strategies", "greedy,majority,best_of_n,beam", "--out", "out"]) == 0
    table = capsys.readouterr().out.strip()
    records = lines("out/records.jsonl")
    # greedy, and two seeds of samples and beams at two budgets
    assert len(records) == 6 + 2 * (6 + 2 * 6)
    assert all(record["id"] == record["problem"] for record in records)
    card = json.loads(Path("out/report.json").read_text())
    assert card["missing"] == 0
    assert card["about"]["plan"]["budgets"] == [1, 4]
    assert "delimiter=';'" in card["about"]["plan"]["steps"]  # the pair's card says so
    rows = {(row["strategy"], row["n"]): row for row in card["rows"]}
    assert set(rows) == {("greedy", 1), *((name, n) for name in ("majority", "best_of_n", "beam") for n in (1, 4))}
    best = rows["best_of_n", 4]
    chosen = [
        c["right"] for r in records if r["kind"] == "samples" for c in r["chosen"]
        if (c["strategy"], c["n"]) == ("best_of_n", 4)
    ]  # fmt: skip
    assert best["accuracy"] == sum(chosen) / 12
    assert best["reference_tokens"] == 0 < best["prm_tokens"]
    page = Path("out/report.md").read_text()
    assert "* reference: ./policy\n* beta: 0.05\n" in page  # the pair's card says so
    assert table in page
    assert Path("out/accuracy-policy-tokens.png").exists()

    for name in ("report.md", "report.json"):
        Path("out", name).unlink()
    assert main(["eval", "--report-only", "--out", "out"]) == 0
    assert Path("out/report.md").read_text() == page
    Path("out/report.md").unlink()
    assert main([*COMMAND, "--strategies", "greedy,majority,best_of_n,beam", "--out", "out", "--resume"]) == 0
    assert Path("out/report.md").read_text() == page
    assert lines("out/records.jsonl") == records


def test_what_exists_is_neither_overwritten_nor_mixed(folder, capsys):
    args = [*COMMAND, "--strategies", "majority", "--limit", "1", "--out", "out"]
    assert main(args) == 0
    before = Path("out/records.jsonl").read_text()
    capsys.readouterr()
    assert main(args) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*args, "--resume", "--temperature", "0.5"]) == 2
    assert "same ones" in capsys.readouterr().err
    assert Path("out/records.jsonl").read_text() == before


def test_several_pairs_over_the_same_samples(folder):
    other = Path("other")
    other.mkdir()
    card = {"model": str(pair_dir() / "prm"), "reference": str(pair_dir() / "policy"), "beta": 0.5, "delimiter": ";"}
    (other / "pair.json").write_text(json.dumps(card))
    args = [*COMMAND, "--pair", "./other", "--strategies", "best_of_n,weighted", "--weights", "softmax,sigmoid"]
    assert main([*args, "--out", "out"]) == 0
    records = lines("out/records.jsonl")
    assert len(records) == 12
    for record in records:
        assert set(record["scoring"]) == {"demo", "./other"}
        for sample in record["samples"]:  # the same models, ten times the beta
            assert sample["values"]["./other"]["q"] == pytest.approx(10 * sample["values"]["demo"]["q"], rel=1e-4)
    assert "(./other)" in Path("out/report.md").read_text()


def test_majority_needs_no_pair(folder):
    args = ["eval", "--policy", "demo", *JUDGED, "--data", "test.jsonl", "--strategies", "greedy,majority"]
    assert main([*args, "--budgets", "2", "--limit", "2", "--delimiter", ";", "--out", "out"]) == 0
    assert {c["strategy"] for r in lines("out/records.jsonl") for c in r.get("chosen", [])} == {"majority"}


def test_the_engine_and_its_options_are_passed_on(folder, monkeypatch, demo_models):
    """The run under vLLM itself is in test_vllm_search.py; here the HF engine stands in for it."""
    import prm_search.integrations.vllm.load as vllm_loading

    asked = []
    monkeypatch.setattr(vllm_loading, "load_policy", lambda name, **given: asked.append(given) or demo_models[0])
    args = [*COMMAND, "--strategies", "majority", "--limit", "1", "--out", "out"]
    engine = ["--engine", "vllm", "--dtype", "float32", "--engine-options", '{"max_num_seqs": 4}']
    assert main([*args, *engine]) == 0
    assert asked == [{"dtype": "float32", "max_num_seqs": 4}]
    assert "engine: vllm" in Path("out/report.md").read_text()
    assert main([*args, "--resume"]) == 2  # another engine's records


# -- responses that exist ----------------------------------------------------------------------------------------------


def test_rollouts_are_evaluated_as_the_samples_they_are(folder):
    options = ["--policy", "demo", "--data", "test.jsonl", *JUDGED]
    assert main(["rollout", *options, "--n", "4", "--seed", "3", "--out", "rollouts.jsonl"]) == 0
    assert main(["eval", "--responses", "rollouts.jsonl", "--pair", "demo", *JUDGED, "--out", "offline"]) == 0
    assert main([*COMMAND, "--strategies", "majority,best_of_n,weighted", "--out", "online"]) == 0
    online = {r["problem"]: r for r in lines("online/records.jsonl") if r["seed"] == 3}
    offline = lines("offline/records.jsonl")
    assert len(offline) == len(online) == 6
    for record in offline:
        other = online[record["problem"]]
        for mine, theirs in zip(record["samples"], other["samples"], strict=True):
            for name in ("text", "answer", "right", "tokens", "finish"):
                assert mine[name] == theirs[name]
            assert mine["values"]["demo"]["q"] == pytest.approx(theirs["values"]["demo"]["q"], abs=1e-4)
        at_four = [[c for c in r["chosen"] if c["n"] == 4] for r in (record, other)]
        assert at_four[0] == at_four[1]
    assert {row["n"] for row in json.loads(Path("offline/report.json").read_text())["rows"]} == {1, 2, 4}


def test_all_responses_in_a_record(folder):
    write(
        "given.jsonl",
        [
            {"question": "=5a*7b+3?", "responses": ["a*7=5;b+3=8", "a*7=5;b+3=9"], "answer": "8"},
            {"prompt": "=1a+1?", "responses": ["a+1=2", "a+1=3"], "labels": [0, 1]},
        ],
    )
    assert main(["eval", "--responses", "given.jsonl", "--pair", "demo", *JUDGED, "--out", "out"]) == 0
    labels = [[sample["right"] for sample in record["samples"]] for record in lines("out/records.jsonl")]
    assert labels == [[True, False], [False, True]]


def test_the_problem_that_limits_the_budgets_is_named(folder, capsys):
    responses = ["a*7=5;b+3=8", "a*7=5;b+3=9", "a*7=5;b+3=8", "a*7=5;b+3=7"]
    write(
        "given.jsonl",
        [
            {"question": "=5a*7b+3?", "responses": responses, "labels": [1, 0, 1, 0]},
            {"question": "=1a+1?", "responses": responses[:2], "labels": [0, 1]},
        ],
    )
    args = ["eval", "--responses", "given.jsonl", "--strategies", "majority", "--pair", "demo", *JUDGED]
    assert main([*args, "--out", "out"]) == 0
    message = capsys.readouterr().err
    assert "budgets go to 2, since given.jsonl, line 2 has 2 responses and others have up to 4" in message
    assert main([*args, "--out", "one", "--limit", "1"]) == 0
    assert "budgets go to" not in capsys.readouterr().err


def test_records_of_one_response_are_put_together(tmp_path):
    rows = [
        {"problem": 1, "sample": 1, "prompt_ids": [3, 4], "response": "b", "response_ids": [7, 1], "label": 0},
        {"problem": 0, "sample": 0, "prompt_ids": [3], "response": "c", "response_ids": [8], "finish": "length"},
        {"problem": 1, "sample": 0, "prompt_ids": [3, 4], "response": "a", "response_ids": [6, 1], "label": 1},
        {"problem": "What?", "response": "d", "label": 1},
        {"problem": "What?", "response": "e", "label": 0},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, found = read_responses(str(path))
    assert [[r.text for r in each.responses] for each in found] == [["a", "b"], ["c"], ["d", "e"]]
    assert [each.prompt.token_ids for each in found] == [(3, 4), (3,), None]
    assert found[0].responses[0].token_ids == (6, 1)
    assert [r.right for r in found[0].responses] == [True, False]
    assert found[1].responses[0].cut
    assert len({item.digest() for item in items}) == 3


# -- bad input ---------------------------------------------------------------------------------------------------------

DATA = ["--data", "test.jsonl"]
BAD = {
    "no policy": (["--pair", "demo", *DATA], "--policy and --data"),
    "no data": (["--pair", "demo", "--policy", "demo"], "--policy and --data"),
    "both": (["--responses", "x.jsonl", "--policy", "demo", "--pair", "demo"], "--policy and --data"),
    "no pair": (["--policy", "demo", *DATA], "a pair is needed for best_of_n"),
    "pair twice": (["--policy", "demo", "--pair", "demo", "--pair", "demo", *DATA], "--pair"),
    "pair and prm": (["--policy", "demo", "--pair", "demo", "--prm", "x", *DATA], "--pair"),
    "strategy": ([*MODELS, *DATA, "--strategies", "greedy,best"], "'best' is unknown"),
    "budgets": ([*MODELS, *DATA, "--budgets", "1,four"], "--budgets '1,four'"),
    "budget 0": ([*MODELS, *DATA, "--budgets", "0"], "budgets=0"),
    "values": ([*MODELS, *DATA, "--values", "worst"], "'worst' is unknown"),
    "shape": ([*MODELS, *DATA, "--shape", "4x4"], "--shape '4x4'"),
    "shape of no budget": ([*MODELS, *DATA, "--shape", "8=2x4"], "shapes: 8"),
    "temperature": ([*MODELS, *DATA, "--temperature", "-1"], "temperature=-1"),
    "engine": ([*MODELS, *DATA, "--engine", "trt"], "--engine 'trt'"),
    "system": ([*MODELS, *DATA, "--system", "x"], "--chat"),
    "no such file": ([*MODELS, "--data", "none.jsonl"], "none.jsonl"),
    "prompt too long": ([*MODELS, "--data", "long.jsonl"], "long.jsonl, line 2: "),
    "nothing there": (["--report-only"], "--out out holds no evaluation"),
    "offline without a pair": (["--responses", "few.jsonl"], "a pair is needed"),
    "beam offline": (["--responses", "few.jsonl", "--pair", "demo", "--strategies", "beam"], "beam would sample"),
    "too few responses": (["--responses", "few.jsonl", "--pair", "demo", "--budgets", "4"], "few.jsonl, line 1: has 1"),
    "template offline": (
        ["--responses", "few.jsonl", "--pair", "demo", "--template", "{}"],
        "--template is for --data",
    ),
    "seeds offline": (["--responses", "few.jsonl", "--pair", "demo", "--seeds", "0,1"], "--seeds is for --data"),
    "no label": (["--responses", "few.jsonl", "--pair", "demo"], "few.jsonl, line 1: a response has no label"),
    "empty response": (["--responses", "empty.jsonl", "--pair", "demo"], "empty.jsonl, line 1: a response must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_records(folder, capsys, case):
    write("long.jsonl", [{"question": p, "answer": 1} for p in ("=1a+1?", "=5" + "a*7" * 70 + "?")])
    write("few.jsonl", [{"question": "=1a+1?", "responses": ["a+1=2"]}])
    write("empty.jsonl", [{"question": "=1a+1?", "response": ""}])
    args, word = BAD[case]
    assert main(["eval", *args, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
    assert not Path("out/records.jsonl").exists()


def test_help_loads_no_model_library(tmp_path):
    code = (
        "import sys; from prm_search.cli import main; "
        "assert main(['eval', '--help']) == main(['eval-steps', '--help']) == 0; "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"


# -- killed and resumed ------------------------------------------------------------------------------------------------


def test_killed_and_resumed_is_as_if_never_killed(folder):
    """SIGKILL among the samples: nothing that was finished is lost, nothing is drawn twice, the whole is the same."""
    write("many.jsonl", [{"prompt": p.prompt, "answer": p.answer} for p in problems(12, length=3)])
    args = ["eval", *MODELS, "--data", "many.jsonl", "--strategies", "greedy,majority,best_of_n,beam"]
    args += ["--budgets", "4", "--batch", "4"]
    with held(AFTER_RECORDS.replace("COUNT", "14"), *args, "--out", "out"):  # 12 greedy answers, and some samples
        pass
    out = Path("out/records.jsonl")
    kept = out.read_bytes()
    assert kept.count(b"\n") == 14
    with out.open("ab") as file:  # a line that was being written
        file.write(b'{"index": 30, "ki')
    assert main(["eval", "--report-only", "--out", "out"]) == 0
    assert "22 records are missing" in Path("out/report.md").read_text()
    assert main([*args, "--out", "out", "--resume"]) == 0
    assert out.read_bytes().startswith(kept)
    assert main([*args, "--out", "whole"]) == 0
    resumed, whole = lines("out/records.jsonl"), lines("whole/records.jsonl")
    assert len(resumed) == len(whole) == 36
    resumed, whole = (sorted(each, key=lambda record: record["index"]) for each in (resumed, whole))
    assert same(untimed(resumed), untimed(whole))
    cards = [json.loads(Path(name, "report.json").read_text())["rows"] for name in ("out", "whole")]
    for one, other in zip(*cards, strict=True):
        assert one.pop("seconds") > 0
        assert other.pop("seconds") > 0
        assert same(one, other)
