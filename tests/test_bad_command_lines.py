"""Command lines and files that cannot be used, by kind: status 2, and one line that names the option or the line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prm_search.cli import main
from prm_search.commands import html
from prm_search.commands.models import load_pair, load_policy
from prm_search.commands.records import Item
from prm_search.demo import pair_dir
from prm_search.evaluation.plan import Plan
from prm_search.strategies import Beam
from prm_search.training.recipe import Recipe
from prm_search.tree import Prompt

HALF = "\ud800"
DEEP = "[" * 5000 + "]" * 5000
HUGE = str(10**22)
DIGITS = "9" * 5000
FILES: dict[str, object] = {
    "half.jsonl": json.dumps({"prompt": f"=5{HALF}?", "response": "a"}),
    "half_question.jsonl": json.dumps({"question": f"=5{HALF}?", "answer": "5"}),
    "half_response.jsonl": json.dumps({"prompt": "=5a*7?", "response": HALF}),
    "half_step.jsonl": json.dumps({"problem": "=5a*7?", "steps": [f"a{HALF}"], "label": -1}),
    "half_responses.jsonl": json.dumps({"problem": "=5a*7?", "responses": [HALF, "b"], "labels": [0, 1]}),
    "bytes.jsonl": b'{"prompt": "=5a*7?"}\n{"prompt": "\xff"}',
    "deep.jsonl": f'{{"prompt": {DEEP}}}',
    "deep_id.jsonl": json.dumps({"prompt": "=5a*7?"})[:-1] + ', "id": ' + "[" * 150 + "]" * 150 + "}",
    "digits.jsonl": f'{{"prompt": [{DIGITS}]}}',
    "ids.jsonl": json.dumps({"prompt": [99999], "response": "a", "steps": ["a"], "label": -1}),
    "wide_ids.jsonl": json.dumps({"prompt_ids": [1], "response_ids": [1 << 33], "label": 1}),
    "sample.jsonl": json.dumps({"problem": 0, "prompt_ids": [1], "response": "a", "sample": "x", "label": 1}),
    "question.jsonl": json.dumps({"question": "=5a*7?", "answer": "5"}),
    "response.jsonl": json.dumps({"prompt": "=5a*7?", "response": "a*7=5"}),
    "rollouts.jsonl": json.dumps({"prompt_ids": [1], "response_ids": [5], "label": 1}),
    "messages.jsonl": json.dumps({"messages": "a", "answer": "5", "steps": ["a"], "label": 0}),
    "message_ids.jsonl": json.dumps({"messages": [4, 5], "response": "a"}),
    "tree.json": f'{{"nodes": {DEEP}}}',
}
GENERATE = ["generate", "--policy", "demo", "--pair", "demo"]
ONE = [*GENERATE, "--prompt", "=5a*7?"]
ROLLOUT = ["rollout", "--policy", "demo", "--label", "exact", "--out", "out"]
SCORE = ["score", "--pair", "demo"]
STEPS = ["eval-steps", "--pair", "demo", "--delimiter", ";", "--out", "folder"]
EVAL = ["eval", "--policy", "demo", "--pair", "demo", "--label", "exact", "--data", "question.jsonl", "--out", "folder"]
TRAIN = ["train", "--model", "demo", "--out", "pair", "--rollouts"]
BAD: dict[str, tuple[list[str], str]] = {
    "half a character in a prompt": (
        [*GENERATE, "--prompts-file", "half.jsonl"],
        "half.jsonl, line 1: the text has half",
    ),
    "messages that are a text": ([*GENERATE, "--prompts-file", "messages.jsonl"], 'messages.jsonl, line 1: "messages"'),
    "messages that are ids": ([*SCORE, "--data", "message_ids.jsonl"], 'message_ids.jsonl, line 1: "messages"'),
    "messages of a problem": ([*ROLLOUT, "--data", "messages.jsonl"], 'messages.jsonl, line 1: "messages"'),
    "messages of a solution": ([*STEPS, "--data", "messages.jsonl"], 'messages.jsonl, line 1: "messages"'),
    "tokens of a step": ([*ONE, "--step-tokens", "-1"], "--step-tokens: max_tokens=-1"),
    "a pattern": ([*ONE, "--step-regex", "("], "--step-regex: regex='('"),
    "a confidence": ([*ONE, "--step-confidence", "nan"], "--step-confidence: confidence=nan"),
    "nodes of a budget": ([*ONE, "--budget-nodes", "0"], "--budget-nodes: budget: nodes=0"),
    "depth of a budget": ([*ONE, "--budget-depth", "0"], "--budget-depth: budget: depth=0"),
    "seconds of a budget": ([*ONE, "--budget-seconds", "nan"], "--budget-seconds: budget: seconds=nan"),
    "a learning rate": ([*TRAIN, "rollouts.jsonl", "--lr", "0"], "--lr: learning_rate=0.0"),
    "in a question": ([*ROLLOUT, "--data", "half_question.jsonl"], "half_question.jsonl, line 1: the text has half"),
    "in a response": ([*SCORE, "--data", "half_response.jsonl"], r"half_response.jsonl, line 1: the text has half"),
    "in a step": ([*STEPS, "--data", "half_step.jsonl"], "half_step.jsonl, line 1: the text has half"),
    "in responses": (
        ["eval", "--pair", "demo", "--responses", "half_responses.jsonl", "--out", "folder"],
        "half_responses.jsonl, line 1: the text has half",
    ),
    "an argument that is not UTF-8": ([*GENERATE, "--prompt", "a\udcff"], r"--prompt 'a\udcff' has half a character"),
    "a delimiter that is not": ([*ONE, "--delimiter", "\udcff"], "--delimiter"),
    "a template that is not": ([*ROLLOUT, "--data", "question.jsonl", "--template", "{}\udcff"], "--template"),
    "a file that is not": (
        [*GENERATE, "--prompts-file", "bytes.jsonl"],
        "bytes.jsonl, line 2 cannot be read: not UTF-8 (byte 12)",
    ),
    "nested too deep": (
        [*GENERATE, "--prompts-file", "deep.jsonl"],
        "deep.jsonl, line 1: JSON that is nested too deep",
    ),
    "an id that could not be written": (
        [*GENERATE, "--prompts-file", "deep_id.jsonl", "--out", "out"],
        "line 1: JSON that",
    ),
    "a tree nested too deep": (["export-tree", "tree.json", "--out", "out"], "tree.json, line 1: JSON that is nested"),
    "a number of 5,000 digits": (
        [*GENERATE, "--prompts-file", "digits.jsonl"],
        "digits.jsonl, line 1: Exceeds the limit",
    ),
    "ids outside the vocabulary": ([*STEPS, "--data", "ids.jsonl"], "ids.jsonl, line 1: token ids 99999"),
    "ids beyond 32 bits": ([*TRAIN, "wide_ids.jsonl"], "wide_ids.jsonl, line 1: no rollout"),
    "a sample that is no place": (
        ["eval", "--pair", "demo", "--responses", "sample.jsonl", "--out", "folder"],
        'sample.jsonl, line 1: "sample" is',
    ),
    "a huge width": ([*ONE, "--width", HUGE], f"width={HUGE}: at most 1,048,576"),
    "width as a float": ([*ONE, "--width", "1e22"], "--width"),
    "5,000 digits of width": ([*ONE, "--width", DIGITS], "--width"),
    "huge subtrees": ([*ONE, "--strategy", "dvts", "--subtrees", HUGE], f"subtrees={HUGE}: at most"),
    "huge steps": ([*ONE, "--strategy", "lookahead", "--steps", HUGE], f"steps={HUGE}: at most"),
    "a huge batch": ([*ONE, "--batch", HUGE], f"--batch {HUGE}: at most"),
    "huge n": ([*ROLLOUT, "--data", "question.jsonl", "--n", HUGE], f"--n {HUGE}: at most"),
    "a huge limit": ([*ROLLOUT, "--data", "question.jsonl", "--limit", HUGE], f"--limit {HUGE}: at most"),
    "a huge budget": ([*EVAL, "--budgets", HUGE], f"budgets={HUGE}"),
    "a huge shape": ([*EVAL, "--budgets", "4", "--shape", f"4={HUGE}x1"], "--shape"),
    "a huge seed": ([*TRAIN, "rollouts.jsonl", "--seed", HUGE], f"seed={HUGE}: an integer from 0"),
    "a seed below 0": ([*TRAIN, "rollouts.jsonl", "--seed", "-1"], "seed=-1"),
    "huge lora": ([*TRAIN, "rollouts.jsonl", "--lora", HUGE], f"lora={HUGE}: at most"),
    "endless epochs": ([*TRAIN, "rollouts.jsonl", "--epochs", "1e300"], "epochs=1e+300"),
    "an unknown argument": ([*TRAIN, "rollouts.jsonl", "--holdout", "0", "--arguments", '{"nope": 1}'], "no 'nope'"),
    "a text for a number": (
        [*TRAIN, "rollouts.jsonl", "--holdout", "0", "--arguments", '{"max_steps": "x"}'],
        "arguments: max_steps='x'",
    ),
    "config.json null": (
        ["score", "--pair", "null", "--data", "response.jsonl"],
        "config.json: a JSON object is needed",
    ),
    "config.json a number": (["score", "--pair", "three", "--data", "response.jsonl"], "config.json: a JSON object"),
    "config.json too deep": (
        ["score", "--pair", "deep", "--data", "response.jsonl"],
        "config.json: JSON that is nested",
    ),
    "of a model to train": (
        ["train", "--model", "null/prm", "--rollouts", "rollouts.jsonl", "--out", "p"],
        "config.json",
    ),
    "a report in a folder that has none": (
        ["eval", "--out", "null", "--report-only"],
        "--out null holds no evaluation",
    ),
    "a folder below a file": ([*ROLLOUT[:-1], "question.jsonl/x", "--data", "question.jsonl"], "not a folder"),
    "a page below a file": (
        [*SCORE, "--data", "response.jsonl", "--html", "question.jsonl/x"],
        "--html question.jsonl/x",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and pairs with a config.json that makes no sense."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else (str(content) + "\n").encode())
    for name, config in (("null", "null"), ("three", "3"), ("deep", DEEP)):
        shutil.copytree(pair_dir(), folder / name)
        (folder / name / "prm/config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def kept() -> object:
    """The demo's models, loaded once."""
    return load_policy("demo"), load_pair("demo", None, None)


@pytest.fixture
def run(
    folder: Path, kept: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(folder)

    def call(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.mark.parametrize("case", BAD)
def test_one_line_that_names_it(case, run, folder):
    words, named = BAD[case]
    status, out, err = run(*words)
    assert (status, out) == (2, ""), err
    assert err.startswith("prm-search: ")
    assert err.count("\n") == 1, err
    assert named in err
    assert len(err) < 600
    assert not (folder / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_page_on_a_full_disk(run):
    _, _, err = run(*SCORE, "--data", "response.jsonl", "--html", "/dev/full")
    assert err == "prm-search: --html /dev/full cannot be written: No space left on device\n"


def test_a_record_with_half_a_character_is_written_and_read_again(run, folder):
    """An id is copied as it is, and stops neither this run nor a later --resume."""
    (folder / "id.jsonl").write_text(json.dumps({"id": HALF, "prompt": "=5a*7?", "response": "a*7=5"}) + "\n")
    for more in ([], ["--resume"]):
        assert run(*SCORE, "--data", "id.jsonl", "--out", "ids", *more)[0] == 0
    assert json.loads((folder / "ids").read_text())["id"] == HALF


def test_files_with_any_name_are_read_and_written(run, folder):
    """Names of files are bytes: they may be no UTF-8."""
    (folder / "r\udcff.jsonl").write_text(str(FILES["response.jsonl"]) + "\n")
    assert run(*SCORE, "--data", "r\udcff.jsonl", "--out", "new/o\udcff", "--html", "pages/p\udcff.html")[0] == 0
    assert (folder / "new/o\udcff").exists()
    assert (folder / "pages/p\udcff.html").exists()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Recipe(seed=1 << 32), "seed=4294967296: an integer from 0 to"),
        (lambda: Recipe(seed=1.5), "seed=1.5"),
        (lambda: Recipe(bf16=1), "bf16=1: True or False"),
        (lambda: Recipe(pack="no"), "pack='no': True or False"),
        (lambda: Recipe(save_steps=True), "save_steps=True: an integer >= 1"),
        (lambda: Recipe(batch=1 << 21), "batch=2097152: at most 1,048,576"),
        (lambda: Recipe(lora=0), "lora=0: an integer >= 1"),
        (lambda: Recipe(beta=1e39), r"beta=1e\+39"),
        (lambda: Recipe(learning_rate="x"), "learning_rate='x'"),
        (lambda: Recipe(holdout=1), "holdout=1: a share"),
        (lambda: Recipe(margin=float("nan"), objective="ipvrm"), "margin=nan"),
        (lambda: Beam(width=1 << 21), "width=2097152: at most"),
        (lambda: Plan(budgets=(1 << 21,)), "budgets=2097152"),
    ],
)
def test_of_the_library(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


# -- pages -------------------------------------------------------------------------------------------------------------


def test_a_page_counts_in_words_and_has_one_scale():
    records = [
        {"index": i, "reward": q[-1], "tokens": tokens, "token_rewards": q, "q": q, "step_ends": [len(q)],
         "step_rewards": [q[-1]]}
        for i, (tokens, q) in enumerate([(["a"], [4.0]), (["", "四"], [-1.0, 1.0])])
    ]  # fmt: skip
    source = html.page("t", "s", [(Item("here", Prompt(text="p")), record) for record in records])
    assert "1 token, 1 step<" in source
    assert "2 tokens, 1 step<" in source
    assert source.count("q: -1.000 to +4.000") == 2
    assert f">{html.PART}</span>" in source  # a token of part of a character can be pointed at
    only = html.page("t", "s", [(Item("here", Prompt(text="p")), records[0])])
    assert "s; 1 response." in only
