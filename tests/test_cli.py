"""The command line: what it prints and writes, what it says of bad input, and what is left after Ctrl-C."""

from __future__ import annotations

import json
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from processes import AFTER_RECORDS, held, python
from records import lines, parsed, write

import prm_search as ps
from prm_search.commands import BadInput, html, options, records, render
from prm_search.demo import pair_dir
from prm_search.demo.chains import problems
from prm_search.steps import StepRule
from prm_search.tree import Prompt, SearchTree

PROMPTS = [problem.prompt for problem in problems(6, length=4)]
DEMO = ["--policy", "demo", "--pair", "demo"]
RESPONSES = [
    {"id": "<b>&", "prompt": "=5a*7b+3c*9?", "response": "a*7=5;b+3=8;c*9=2"},
    {"prompt": "=5a*7b+3c*9?", "response": "a*7=5;b+3=9;c*9=1"},
    {"prompt": "=1a+1?", "response": "a+1=2"},
]


@pytest.fixture
def folder(workdir: Path, demo_models: object) -> Path:
    """A folder with prompts and responses, which is the current one."""
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    write("responses.jsonl", RESPONSES)
    return workdir


# -- the program -------------------------------------------------------------------------------------------------------


def test_help_loads_no_model_library(tmp_path):
    code = """
import sys
from prm_search.cli import main
for args in (["--help"], *([name, "--help"] for name in ("demo", "generate", "score", "serve")), ["--version"]):
    assert main(args) == 0, args
print([m for m in ("torch", "transformers", "fastapi") if m in sys.modules])
"""
    printed = python(code, tmp_path)
    assert printed.splitlines()[-1] == "[]"
    for word in ("--problems", "--strategy", "--html", ps.__version__):
        assert word in printed


def test_no_command_shows_help_and_fails(run):
    status, out, err = run()
    assert status == 2
    assert "generate" in out
    assert err.count("\n") == 1


def test_errors_of_the_program_are_not_dressed_up_as_bad_input(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("prm_search.commands.models.load_policy", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", *DEMO, "--prompt", PROMPTS[0])


# -- bad input: one line that names what was wrong, status 2 -----------------------------------------------------------

BAD = {
    "unknown command": (["frobnicate"], "frobnicate"),
    "unknown option": (["generate", *DEMO, "--prompt", "x", "--widht", "3"], "--widht"),
    "not a number": (["generate", *DEMO, "--prompt", "x", "--width", "three"], "--width"),
    "no policy": (["generate", "--prompt", "x"], "--policy"),
    "no pair": (["generate", "--policy", "demo", "--prompt", "x"], "--pair"),
    "pair and prm": (["generate", *DEMO, "--prm", "x", "--prompt", "x"], "--pair"),
    "reference alone": (["generate", "--policy", "demo", "--reference", "x", "--prompt", "x"], "--reference"),
    "no prompt": (["generate", *DEMO], "--prompt"),
    "empty prompt": (["generate", *DEMO, "--prompt", ""], "--prompt 1: the prompt is empty"),
    "blank second prompt": (["generate", *DEMO, "--prompt", "=5a*7?", "--prompt", "  "], "--prompt 2"),
    "unknown strategy": (["generate", *DEMO, "--prompt", "x", "--strategy", "best"], "best_of_n"),
    "other strategy's option": (["generate", *DEMO, "--prompt", "x", "--n", "3"], "--n is not an option of"),
    "width 0": (["generate", *DEMO, "--prompt", "x", "--width", "0"], "width=0"),
    "rollouts 0": (["generate", *DEMO, "--prompt", "x", "--strategy", "lookahead", "--rollouts", "0"], "rollouts=0"),
    "NaN temperature": (["generate", *DEMO, "--prompt", "x", "--temperature", "nan"], "temperature=nan"),
    "negative temperature": (["generate", *DEMO, "--prompt", "x", "--temperature", "-1"], "temperature=-1"),
    "top-p 2": (["generate", *DEMO, "--prompt", "x", "--top-p", "2"], "top_p=2"),
    "no tokens": (["generate", *DEMO, "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0"),
    "no budget": (["generate", *DEMO, "--prompt", "x", "--budget", "0"], "tokens=0"),
    "empty delimiter": (["generate", *DEMO, "--prompt", "x", "--delimiter", ""], "delimiter"),
    "bad pattern": (["generate", *DEMO, "--prompt", "x", "--step-regex", "("], "regex"),
    "unknown value": (["generate", *DEMO, "--prompt", "x", "--value", "worst"], "worst"),
    "unknown select": (["generate", *DEMO, "--prompt", "x", "--select", "any"], "--select"),
    "unknown answer": (["generate", *DEMO, "--prompt", "x", "--answer", "any"], "answer"),
    "unknown dtype": (["generate", *DEMO, "--prompt", "=5a*7?", "--dtype", "int3"], "--dtype"),
    "unknown device": (["generate", *DEMO, "--prompt", "=5a*7?", "--device", "abacus"], "--device"),
    "prompt longer than context": (["generate", *DEMO, "--prompt", "=5" + "a*7" * 70 + "?"], "context of 128"),
    "no chat template": (["generate", *DEMO, "--prompt", "=5a*7?", "--chat"], "chat template"),
    "system without chat": (["generate", *DEMO, "--prompt", "x", "--system", "y"], "--chat"),
    "resume without out": (["generate", *DEMO, "--prompt", "x", "--resume"], "--out"),
    "no such file": (["generate", *DEMO, "--prompts-file", "none.txt"], "none.txt"),
    "no such model": (["generate", "--policy", "./none", "--pair", "demo", "--prompt", "x"], "none"),
    "no such pair": (["score", "--pair", "./none", "--data", "responses.jsonl"], "none"),
    "missing reference": (["score", "--prm", "lone", "--data", "responses.jsonl"], "reference is missing"),
    "corrupt checkpoint": (["score", "--pair", "corrupt", "--data", "responses.jsonl"], "SafetensorError"),
    "corrupt card": (["score", "--pair", "card", "--data", "responses.jsonl"], "pair.json"),
    "lost reference": (
        ["score", "--pair", "lost", "--data", "responses.jsonl"],
        "reference='./policy' of 'lost/pair.json'",
    ),
    "huge beta": (["score", "--pair", "demo", "--beta", "1e39", "--data", "responses.jsonl"], "beta=1e+39: a finite"),
    "tiny beta": (
        ["train", "--model", "demo", "--rollouts", "responses.jsonl", "--out", "o", "--beta", "1e-50"],
        "1e-50",
    ),
    "other vocabulary": (["score", "--prm", "lone", "--reference", "words", "--data", "responses.jsonl"], "vocabular"),
    "beta 0": (["score", "--pair", "demo", "--beta", "0", "--data", "responses.jsonl"], "beta=0"),
    "not JSON": (["score", "--pair", "demo", "--data", "broken.jsonl"], "broken.jsonl, line 2"),
    "no response": (["score", "--pair", "demo", "--data", "half.jsonl"], "half.jsonl, line 1"),
    "response too long": (["score", "--pair", "demo", "--data", "long.jsonl"], "long.jsonl, line 2: 26"),
    "html below a file": (
        ["score", "--pair", "demo", "--data", "responses.jsonl", "--html", "half.jsonl/x.html"],
        "half.jsonl/x.html",
    ),
    "out below a file": (
        ["score", "--pair", "demo", "--data", "responses.jsonl", "--out", "half.jsonl/x.jsonl"],
        "half.jsonl/x.jsonl",
    ),
    "no problems": (["demo", "--problems", "0"], "--problems 0"),
    "data for the wrong model": (["demo", "--data", "x"], "--data"),
    "unknown demo": (["demo", "--model", "gpt"], "--model"),
}


@pytest.fixture
def wreckage(folder: Path) -> None:
    """Broken inputs of every kind."""
    shutil.copytree(pair_dir() / "prm", "lone")
    shutil.copytree(pair_dir(), "corrupt")
    weights = Path("corrupt/prm/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.copytree(pair_dir(), "card")
    Path("card/pair.json").write_text("{")
    shutil.copytree(pair_dir(), "lost")
    shutil.rmtree("lost/policy")
    shutil.copytree(pair_dir() / "policy", "words")
    tokenizer = json.loads(Path("words/tokenizer.json").read_text())
    swapped = {"*3": "*7", "*7": "*3"}
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {swapped.get(token, token): place for token, place in vocabulary.items()}
    Path("words/tokenizer.json").write_text(json.dumps(tokenizer))
    first = json.dumps(RESPONSES[0]) + "\n"
    Path("broken.jsonl").write_text(first + '{"prompt": \n')
    Path("half.jsonl").write_text(json.dumps({"prompt": "=5a*7?"}) + "\n")
    Path("long.jsonl").write_text(first + json.dumps({"prompt": "=5a*7?", "response": "a*7=5;" * 65}) + "\n")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, run, wreckage):
    args, named = BAD[case]
    status, out, err = run(*args)
    assert status == 2
    assert out == ""
    assert err.startswith("prm-search: ")
    assert err.count("\n") == 1, err
    assert named in err


def test_debug_shows_the_traceback(run, folder):
    status, _, err = run("generate", *DEMO, "--prompt", "x", "--width", "0", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("prm-search: width=0")


@pytest.mark.parametrize("wrong", ['{"prompt": 3}', '{"prompt": []}', '{"text": "x"}', "[1]", '{"messages": [{}]}'])
def test_records_that_are_no_prompts_are_named(wrong, run, folder):
    Path("p.jsonl").write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n" + wrong + "\n")
    status, _, err = run("generate", *DEMO, "--prompts-file", "p.jsonl")
    assert status == 2
    assert "p.jsonl, line 2" in err


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_gives_what_search_gives(run, folder, demo_models):
    status, out, err = run(
        "generate", *DEMO, "--prompts-file", "prompts.txt", "--width", 2, "--expansions", 3, "--value", "min",
        "--temperature", 1.2, "--max-new-tokens", 24, "--seed", 7, "--answer", "number", "--budget", 200, "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    policy, pair = demo_models
    expected = ps.search(
        PROMPTS,
        policy=policy,
        scorer=pair,
        strategy=ps.Beam(2, 3),
        steps=StepRule(";"),
        max_new_tokens=24,
        temperature=1.2,
        seed=7,
        value="min",
        answer="number",
        budget=200,
    )
    found = {record["index"]: record for record in parsed(out)}
    assert sorted(found) == list(range(len(PROMPTS)))
    for place, result in enumerate(expected):
        record = found[place]
        assert record["prompt"] == PROMPTS[place]
        assert (record["text"], record["answer"], record["stopped"]) == (result.text, result.answer, result.stopped)
        assert record["value"] == pytest.approx(result.value, abs=1e-4)
        assert "".join(step["text"] for step in record["steps"]) == result.text
        assert record["steps"][-1]["q"] == pytest.approx(result.node.q, abs=1e-4)
        assert record["sampled_tokens"] == result.usage.sampled_tokens
        assert sum(candidate["count"] for candidate in record["candidates"]) == sum(
            node.count for node in result.candidates
        )


@pytest.mark.parametrize(
    ("args", "strategy"),
    [
        (["--strategy", "best_of_n", "--n", 3], ps.BestOfN(3)),
        (["--strategy", "best-of-n", "--n", 3], ps.BestOfN(3)),
        (["--strategy", "dvts", "--subtrees", 2, "--width", 1], ps.DVTS(2, width=1)),
        (
            ["--strategy", "lookahead", "--steps", 2, "--rollouts", 3, "--reduce", "max"],
            ps.Lookahead(steps=2, rollouts=3, reduce="max"),
        ),
        (["--strategy", "beam", "--per-parent", 1], ps.Beam(per_parent=1)),
        (["--strategy", "steer", "--alpha", 0.5], ps.Steer(0.5)),
        (["--strategy", '{"name": "steer", "below": 0.6, "candidates": 2}'], ps.Steer(below=0.6, candidates=2)),
        (["--strategy", '{"name": "self_consistency", "n": 4, "stop": "beta"}'], ps.SelfConsistency(4, "beta")),
    ],
)
def test_every_strategy_can_be_asked_for(args, strategy, run, folder, demo_models):
    status, out, _ = run("generate", *DEMO, "--prompt", PROMPTS[0], "--json", "--max-new-tokens", 20, *args)
    assert status == 0
    policy, pair = demo_models
    (result,) = ps.search(
        PROMPTS[:1], policy=policy, scorer=pair, strategy=strategy, steps=StepRule(";"), max_new_tokens=20
    )
    (record,) = parsed(out)
    assert record["text"] == result.text
    assert record["sampled_tokens"] == result.usage.sampled_tokens


def test_majority_needs_no_pair(run, folder):
    args = ["--policy", "demo", "--strategy", "best_of_n", "--n", 5, "--select", "majority", "--answer", "number"]
    status, out, _ = run("generate", *args, "--prompt", PROMPTS[0], "--json")
    (record,) = parsed(out)
    assert status == 0
    assert record["answer"]
    assert "q" not in record["steps"][0]


def test_tree_in_json_is_a_search_tree(run, folder):
    _, out, _ = run("generate", *DEMO, "--prompt", PROMPTS[0], "--json", "--tree")
    (record,) = parsed(out)
    tree = SearchTree.from_json(json.dumps(record["tree"]))
    assert tree.prompt.text == PROMPTS[0]
    assert record["text"] in {node.path_text() for node in tree.nodes}


def test_text_output_has_answer_and_rewards_and_no_escapes(run, folder):
    status, out, err = run("generate", *DEMO, "--prompt", PROMPTS[0], "--tree", "--answer", "number")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert PROMPTS[0] in out
    for word in ("step rewards", "tokens sampled", "answer ", "> a"):
        assert word in out


def test_chat_prompts_go_through_the_template(run, folder):
    shutil.copytree(pair_dir() / "policy", "chat")
    config = json.loads(Path("chat/tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}?"
    Path("chat/tokenizer_config.json").write_text(json.dumps(config))
    args = ["--policy", "chat", "--strategy", "best_of_n", "--n", 1, "--delimiter", ";", "--json", "--temperature", 0]
    _, chat, _ = run("generate", *args, "--chat", "--system", "=5", "--prompt", "a*7b+3")
    _, plain, _ = run("generate", *args, "--prompt", "=5a*7b+3?")
    (chat,), (plain,) = parsed(chat), parsed(plain)
    assert chat["prompt"] == [{"role": "system", "content": "=5"}, {"role": "user", "content": "a*7b+3"}]
    assert chat["text"].startswith("a*7=")
    assert chat["text"] == plain["text"]


def test_a_delimiter_that_never_comes_is_said(run, folder):
    status, out, err = run("generate", *DEMO, "--prompt", PROMPTS[0], "--delimiter", r"\n\n", "--json")
    assert status == 0
    assert len(parsed(out)[0]["steps"]) == 1
    assert "--delimiter" in err


def test_answers_that_are_all_cut_are_reported_as_such(run, folder):
    _, out, _ = run("generate", *DEMO, "--prompt", PROMPTS[0], "--json", "--max-new-tokens", 6)
    (record,) = parsed(out)
    assert record["stopped"] == "length"
    assert {candidate["finish"] for candidate in record["candidates"]} == {"length"}


# -- files that survive being stopped ----------------------------------------------------------------------------------

GENERATE = ["generate", *DEMO, "--prompts-file", "prompts.txt", "--width", 2, "--expansions", 2]
SCORE = ["score", "--pair", "demo", "--data", "responses.jsonl"]


def by_index(path: str) -> list[dict[str, object]]:
    return sorted(lines(path), key=lambda record: record["index"])


@pytest.mark.parametrize(("command", "batch"), [(GENERATE, 1), (GENERATE, 3), (SCORE, 1)])
def test_a_stopped_run_goes_on_where_it_was(command, batch, run, folder, monkeypatch):
    assert run(*command, "--out", "whole.jsonl")[0] == 0
    whole = by_index("whole.jsonl")

    written = records.RecordFile.write

    def stop_at_the_third(self, record):
        if len(Path(self.path).read_text().splitlines()) == 2:
            raise KeyboardInterrupt
        written(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(records.RecordFile, "write", stop_at_the_third)
        status, _, err = run(*command, "--out", "part.jsonl", "--batch", batch)
    assert status == 130
    assert "part.jsonl has 2 of" in err
    kept = Path("part.jsonl").read_text()
    assert len(parsed(kept)) == 2

    Path("part.jsonl").write_text(kept + '{"index": 2, "ke')  # a line that was being written when power failed
    status, _, err = run(*command, "--out", "part.jsonl", "--resume")
    assert (status, err) == (0, "")
    assert Path("part.jsonl").read_text().startswith(kept)
    for again, once in zip(by_index("part.jsonl"), whole, strict=True):
        assert again.keys() == once.keys()
        for name in ("index", "key", "text", "sampled_tokens", "stopped", "token_ids", "step_ends"):
            assert again.get(name) == once.get(name)
        for name in ("value", "reward", "token_rewards"):
            assert again.get(name) == pytest.approx(once.get(name), abs=1e-4)


def test_a_real_interrupt_keeps_what_is_finished(folder):
    """SIGINT to the installed program, in the middle."""
    Path("many.txt").write_text("\n".join(PROMPTS * 200))
    args = ["generate", *DEMO, "--prompts-file", "many.txt", "--batch", "2", "--out", "out.jsonl"]
    with held(AFTER_RECORDS.replace("COUNT", "3"), *args) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130, process.said()
        said = process.said()
    assert "Traceback" not in said
    assert len(lines("out.jsonl")) == 3
    assert "out.jsonl has 3 of 1200 results" in said
    assert said.endswith("prm-search: interrupted\n")


def test_existing_results_are_never_overwritten_or_mixed(run, folder):
    run(*SCORE, "--out", "s.jsonl")
    before = Path("s.jsonl").read_text()
    for args in ([], ["--resume", "--beta", 1], ["--resume", "--delimiter", "b"], ["--resume", "--cut"]):
        status, _, err = run(*SCORE, "--out", "s.jsonl", *args)
        assert status == 2
        assert "s.jsonl" in err
    assert Path("s.jsonl").read_text() == before
    Path("other.jsonl").write_text('{"a": 1}\n')
    assert run(*SCORE, "--out", "other.jsonl", "--resume")[0] == 2
    assert Path("other.jsonl").read_text() == '{"a": 1}\n'
    assert run(*SCORE, "--out", "s.jsonl", "--resume")[:2] == (0, "")
    assert Path("s.jsonl").read_text() == before


def test_a_run_that_fails_leaves_no_empty_file(run, folder):
    assert run("score", "--pair", "./none", "--data", "responses.jsonl", "--out", "s.jsonl")[0] == 2
    assert not Path("s.jsonl").exists()


def test_equal_prompts_keep_their_own_results():
    items = [records.Item(str(i), Prompt(text=text)) for i, text in enumerate(["a", "b", "a"])]
    keys = records.digests(items, "s")
    assert len(set(keys)) == 3
    assert keys == records.digests(items, "s")
    assert not set(keys) & set(records.digests(items, "t"))


# -- score -------------------------------------------------------------------------------------------------------------


def naive(prompt: str, response: str, beta: float) -> np.ndarray:
    """Token rewards the obvious way: two forwards, log_softmax, gather, subtract."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair_dir() / "policy")
    ask = tokenizer(prompt)["input_ids"]
    ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = []
    for name in ("prm", "policy"):
        model = AutoModelForCausalLM.from_pretrained(pair_dir() / name).eval()
        with torch.inference_mode():
            table = model(torch.tensor([ask + ids])).logits[0].float().log_softmax(-1)
        found.append(table[len(ask) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0].numpy())
    return beta * (found[0] - found[1])


def test_scores_are_the_naive_ones(run, folder):
    status, out, err = run(*SCORE, "--json", "--batch", 2)
    assert (status, err) == (0, "")
    found = parsed(out)
    beta = json.loads((pair_dir() / "pair.json").read_text())["beta"]
    assert [record["index"] for record in found] == [0, 1, 2]
    assert found[0]["id"] == RESPONSES[0]["id"]
    for record, given in zip(found, RESPONSES, strict=True):
        expected = naive(given["prompt"], given["response"], beta)
        np.testing.assert_allclose(record["token_rewards"], expected, atol=1e-4 * beta)
        np.testing.assert_allclose(record["q"], np.cumsum(expected), atol=1e-4)
        assert record["reward"] == pytest.approx(expected.sum(), abs=1e-4)
        assert sum(record["step_rewards"]) == pytest.approx(record["reward"], abs=1e-5)
        assert "".join(record["tokens"]) == given["response"] + "</s>"
        assert record["step_ends"] == [
            *(4 * step for step in range(1, given["response"].count(";") + 1)), len(expected)
        ]  # fmt: skip


def test_beta_scales_and_cut_drops_the_end(run, folder):
    _, plain, _ = run(*SCORE, "--json")
    _, other, _ = run(*SCORE, "--json", "--beta", 1, "--cut")
    beta = json.loads((pair_dir() / "pair.json").read_text())["beta"]
    for a, b in zip(parsed(plain), parsed(other), strict=True):
        assert b["tokens"] == a["tokens"][:-1]
        np.testing.assert_allclose(np.array(b["token_rewards"]) * beta, a["token_rewards"][:-1], rtol=1e-4, atol=1e-6)


def test_pair_and_its_two_models_score_alike(run, folder):
    two = ["--prm", pair_dir() / "prm", "--reference", pair_dir() / "policy", "--delimiter", ";"]
    _, one, _ = run(*SCORE, "--json")
    _, other, _ = run("score", *two, "--data", "responses.jsonl", "--json")
    assert [r["token_rewards"] for r in parsed(one)] == [r["token_rewards"] for r in parsed(other)]


def test_text_of_scores(run, folder):
    status, out, _ = run(*SCORE)
    assert status == 0
    assert "\x1b" not in out
    assert out.count("step rewards") == 3
    assert "a*7=5;b+3=8;c*9=2" in out


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_html_shows_every_response_and_loads_nothing(run, folder):
    assert run(*SCORE, "--html", "out.html", "--out", "s.jsonl")[0] == 0
    source = Path("out.html").read_text()
    page = Page(source)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in source
    assert page.tags.count("article") == page.tags.count("svg") == 3
    scored = by_index("s.jsonl")
    assert page.tags.count("circle") == sum(len(record["step_ends"]) for record in scored)
    assert page.text.count("<b>&") == 1  # the id, as text
    for record in scored:
        for reward in record["step_rewards"]:
            assert f"{reward:+.3f}" in page.text
        for reward in record["token_rewards"]:
            assert any(name == "title" and f"reward {reward:+.4f}," in value for name, value in page.attributes)

    run(*SCORE, "--html", "again.html", "--out", "s.jsonl", "--resume")  # from the file alone
    assert Path("again.html").read_text() == source


def test_html_escapes_everything():
    evil = "</span><script>alert('x')</script>\"\x1b[31m&"
    record = {
        "index": 0, "id": evil, "reward": 0.0, "tokens": [evil, "b"], "token_rewards": [0.0, 0.0], "q": [0.0, 0.0],
        "step_ends": [2], "step_rewards": [0.0],
    }  # fmt: skip
    source = html.page(evil, evil, [(records.Item("here", Prompt(text=evil)), record)])
    page = Page(source)
    assert "script" not in page.tags
    assert "\x1b" not in source
    assert page.text.count("<script>alert('x')</script>") == 6  # twice the title, subtitle, id, prompt, token


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"), [(r"\n\n", "\n\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), ("\\", "\\"), (r"\d", r"\d"), (";", ";")]
)
def test_backslashes_of_a_delimiter(given, text):
    assert options.unescape(given) == text


def test_regex_alone_means_no_delimiter():
    assert options.make_steps(None, None, "[.!]", default=";").delimiter is None
    assert options.make_steps(["x"], None, "[.!]", default=";").delimiter == ("x",)
    assert options.make_steps(None, None, None, default=";") == StepRule(";")
    assert options.make_steps(None, 0, None) == StepRule(max_tokens=None)


def test_control_characters_are_spelt_out():
    assert render.visible("a\x1b[31m\tb\nü→") == "a\\x1b[31m\\tb\\nü→"
    assert render.visible("a\x1b\tb\n", lines=True) == "a\\x1b\tb\n"


def test_reward_colours_grow_from_grey():
    assert render.reward_colour(0.0, 1.0) == render.reward_colour(1.0, 0.0) == (150, 150, 150)
    good, bad = render.reward_colour(1.0, 1.0), render.reward_colour(-1.0, 1.0)
    assert good[1] > good[0]
    assert bad[0] > bad[1]
    assert render.reward_colour(9.0, 1.0) == good
    assert render.reward_colour(0.1, 1.0)[1] > 150


def test_non_finite_numbers_become_null():
    assert json.loads(records.dumps({"a": float("nan"), "b": [float("-inf"), 1.5]})) == {"a": None, "b": [None, 1.5]}


def test_unreadable_encoding_is_bad_input(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadInput, match="cannot be read"):
        records.read_items(str(tmp_path / "p.txt"))
