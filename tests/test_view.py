"""`prm-search view` and the pages of trees: what is read, what is refused, and what stands in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from fakes import FakePolicy, FakeScorer
from page_trees import HOSTILE, add, beam_tree, hostile_tree
from records import lines, write

import prm_search as ps
from prm_search.commands.view import write_page
from prm_search.tokens.pieces import POLICY, Pieces
from prm_search.tree import Prompt, SearchTree
from prm_search.viewer.page import embedded, view_page
from prm_search.viewer.page_tree import PageStep, PageTree

DEMO = ["--policy", "demo", "--pair", "demo"]
PROMPT = "=5a*7b+3c*9?"


def data_of(page: str | Path) -> dict:
    """The data of a page."""
    source = page.read_text() if isinstance(page, Path) else page
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
    return json.loads(found)


def saved(tree: SearchTree, name: str = "tree.json", **record: object) -> str:
    Path(name).write_text(
        json.dumps({**record, "tree": json.loads(tree.to_json())} if record else json.loads(tree.to_json()))
    )
    return name


# -- a page's data -----------------------------------------------------------------------------------------------------


def test_a_tree_becomes_columns():
    tree, end = beam_tree()
    record = PageTree.of(tree, "mine", chosen=end, facts=[("answer", "14")]).record()
    assert record["parent"] == [0, 0, 2, 0, 1, 1]
    assert record["chosen"] == end.index == 5
    assert record["count"] == [3, 1, 1, 1, 1, 1]
    (scorer,) = record["scorers"]
    assert scorer["reward"] == [0.75, -0.75, -0.125, -1, 0.625, -0.5]
    assert scorer["q"][4] == 1.375
    assert scorer["tokenRewards"][0] == [0.25, 0.5]
    assert [record["pieces"][piece] for piece in scorer["pieces"][0]] == ["First, 3 ", "* 4 = 12."]


def test_tokens_without_a_known_text_are_ids():
    tree = SearchTree(Prompt(text="p"))
    tree.add(tree.root, [7, 9], text="ab").set_rewards("prm", np.ones(2, np.float32))
    record = PageTree.of(tree, "t").record()
    assert [record["pieces"][piece] for piece in record["scorers"][0]["pieces"][0]] == [7, 9]


def test_a_pair_with_a_tokenizer_of_its_own_shows_its_own_tokens():
    tree = SearchTree(Prompt(text="p"))
    tree.vocabularies |= {POLICY: Pieces({7: b"a", 9: b"b"}), "other": Pieces({3: b"ab"})}
    node = tree.add(tree.root, [7, 9], text="ab")
    node.set_rewards("prm", np.ones(2, np.float32))
    node.set_rewards("other", np.array([0.5], np.float32), 0.25, [3])
    record = PageTree.of(SearchTree.from_json(tree.to_json()), "t").record()
    texts = {s["name"]: [record["pieces"][piece] for piece in s["pieces"][0]] for s in record["scorers"]}
    assert texts == {"prm": ["a", "b"], "other": ["ab"]}


def test_a_search_keeps_the_bytes_of_its_tokens():
    (result,) = ps.search(["ab"], policy=FakePolicy(), scorer=FakeScorer(), strategy=ps.Beam(2, 2), max_new_tokens=8)
    read = SearchTree.from_json(result.tree.to_json())
    for node in read.nodes[1:]:
        assert b"".join(map(read.vocabularies[POLICY].piece, node.token_ids)).startswith(node.text_bytes)
    assert read.to_json() == result.tree.to_json()


def test_bytes_of_half_a_character_survive():
    tree = SearchTree(Prompt(text="p"))
    tree.vocabularies[POLICY] = Pieces({1: "é".encode()[:1], 2: "é".encode()[1:]})
    tree.add(tree.root, [1, 2], text="é")
    read = SearchTree.from_json(tree.to_json())
    assert [read.vocabularies[POLICY].piece(token) for token in (1, 2)] == [b"\xc3", b"\xa9"]


@pytest.mark.parametrize("pieces", [[], {"": {}}, {"": {"text": {"x": "a"}}}, {"": {"text": {}, "bytes": {"1": "zz"}}}])
def test_pieces_that_are_none_are_refused_by_name(pieces):
    record = json.loads(beam_tree()[0].to_json()) | {"pieces": pieces}
    with pytest.raises(ValueError, match="pieces is"):
        SearchTree.from_json(json.dumps(record))


def test_nothing_that_a_user_wrote_is_markup():
    tree, end = hostile_tree()
    source = view_page(HOSTILE, [PageTree.of(tree, HOSTILE, chosen=end)], [HOSTILE])
    assert source.count("<script") == 2  # its data and its own
    assert source.count("</script>") == 2
    assert "<img" not in source.split('id="data">')[0]
    assert data_of(source)["trees"][0]["text"][0] == HOSTILE


@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028", "&amp;", "\ud800", "é\x00"])
def test_embedded_json_is_json_and_cannot_end_its_element(text):
    source = embedded({"text": text})
    assert not set("<>&\u2028\u2029") & set(source)
    assert json.loads(source) == {"text": text}
    source.encode()


def test_a_page_may_load_nothing():
    source = view_page("t", [PageTree.of(beam_tree()[0], "t")])
    assert "default-src &#x27;none&#x27;" in source
    assert not re.search(r'(src|href)="', source.split("<script>")[0])


def test_a_notebook_shows_the_answer_and_the_tree():
    (result,) = ps.search(["ab"], policy=FakePolicy(), scorer=FakeScorer(), strategy=ps.Beam(2, 2), max_new_tokens=8)
    shown = result._repr_html_()
    assert "<iframe" in shown
    assert 'sandbox="allow-scripts"' in shown
    frame = shown[shown.index('srcdoc="') + 8 :].split('"')[0]
    assert "&lt;script" in frame
    assert "<" not in frame


def test_a_notebook_gets_no_page_of_a_huge_tree():
    from prm_search.viewer.notebook import notebook_html

    tree = PageTree("t", [("", "p")], [PageStep(0, "a") for _ in range(5_001)])
    assert "5,001 steps" in notebook_html(tree, HOSTILE, [])
    assert "<script" not in notebook_html(tree, HOSTILE, [("answer", HOSTILE)])


# -- the command -------------------------------------------------------------------------------------------------------


def test_view_reads_trees_of_to_json(run, workdir):
    tree, _ = beam_tree()
    Path("pretty.json").write_text(tree.to_json(indent=1))
    Path("lines.jsonl").write_text(tree.to_json() + "\n" + tree.to_json() + "\n")
    status, out, err = run("view", "pretty.json", "lines.jsonl", "-o", "out.html")
    assert (status, out, err) == (0, "", "out.html: 3 trees\n")
    assert [one["name"] for one in data_of(Path("out.html"))["trees"]] == ["pretty.json", "lines.jsonl", "lines.jsonl"]


def test_view_finds_the_chosen_path_by_its_steps(run, workdir):
    tree, end = beam_tree()
    steps = [{"text": node.text, "value": node.value} for node in end.path()]
    saved(tree, "r.jsonl", index=0, key="k", steps=steps, answer="14", sampled_tokens={"policy": 9}, stopped="finished")
    assert run("view", "r.jsonl", "-o", "out.html")[0] == 0
    (shown,) = data_of(Path("out.html"))["trees"]
    assert shown["chosen"] == end.index
    assert shown["facts"] == [["answer", "14"], ["stopped", "finished"]]
    assert shown["usage"] == {"sampled_tokens": {"policy": 9}}


def test_view_shows_results_without_trees(run, workdir):
    steps = [
        {"text": "a", "tokens": 1, "value": 0.25, "reward": 0.25, "q": 0.25},
        {"text": "b", "tokens": 1, "value": 0.5},
    ]
    candidates = [
        {"text": "ab", "value": 0.5, "finish": "stop", "count": 2},
        {"text": "c", "value": None, "finish": "length", "count": 1},
    ]
    write("r.jsonl", [{"index": 0, "key": "k", "prompt": "p", "text": "ab", "steps": steps, "candidates": candidates}])
    assert run("view", "r.jsonl", "-o", "out.html")[0] == 0
    (shown,) = data_of(Path("out.html"))["trees"]
    assert (shown["parent"], shown["text"], shown["finish"]) == ([0, 1, 0], ["a", "b", "c"], ["step", "stop", "length"])
    assert "keeps no tree" in shown["notes"][0]


def test_rewards_that_are_no_numbers_are_shown_and_said(run, workdir):
    tree, _ = beam_tree()
    add(tree.root, "strange", [float("nan")], finish="stop")
    add(tree.root, "endless", [float("inf")], finish="stop")
    status, _, err = run("view", saved(tree), "-o", "out.html")
    assert status == 0
    assert "2 steps have a reward that is NaN or infinite" in err
    assert data_of(Path("out.html"))["trees"][0]["scorers"][0]["reward"][-2:] == ["NaN", "inf"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1, 2]", "bad.json, line 1: a JSON object is needed, got list"),
        ('{"prompt": "p", "text": "t"}', "bad.json is neither a tree nor a result"),
        ("not json", "bad.json, line 1: not JSON"),
        ('{"nodes": [], "version": 1}', "bad.json: source is not a search tree in JSON: prompt is missing"),
        ('{"candidates": [{}], "steps": [{"text": 1}]}', "bad.json: a result that is damaged (KeyError: 'tokens')"),
        ("", "bad.json holds no trees"),
    ],
)
def test_what_is_no_tree_is_one_line(run, workdir, content, says):
    Path("bad.json").write_text(content)
    status, out, err = run("view", "bad.json", "-o", "out.html")
    assert (status, out) == (2, "")
    assert err.startswith(f"prm-search: {says}")
    assert err.count("\n") == 1
    assert not Path("out.html").exists()


def test_a_tree_of_another_version_is_refused(run, workdir):
    record = json.loads(beam_tree()[0].to_json()) | {"version": 2}
    Path("new.json").write_text(json.dumps(record))
    assert run("view", "new.json", "-o", "o.html")[2] == (
        "prm-search: new.json: source is not a search tree in JSON: version is 2: 1 is needed\n"
    )


def test_a_folder_for_the_page_is_refused(run, workdir):
    status, _, err = run("view", saved(beam_tree()[0]), "-o", ".")
    assert (status, err) == (2, "prm-search: --out . cannot be written: Is a directory\n")


def test_a_file_that_is_not_there_is_refused(run, workdir):
    assert (
        run("view", "none.json", "-o", "o.html")[2]
        == "prm-search: none.json cannot be read: No such file or directory\n"
    )


def test_generate_writes_the_page_of_its_searches(run, workdir, demo_models):
    Path("p.jsonl").write_text(
        json.dumps({"id": "x", "prompt": PROMPT}) + "\n" + json.dumps({"prompt": "=1a+1?"}) + "\n"
    )
    draw = ["generate", *DEMO, "--prompts-file", "p.jsonl", "--width", "2", "--expansions", "2", "--out", "r.jsonl"]
    assert run(*draw, "--html", "a.html")[0] == 0
    first = data_of(Path("a.html"))
    assert [tree["name"] for tree in first["trees"]] == ["x", "prompt 1"]
    records = sorted(lines("r.jsonl"), key=lambda record: record["index"])
    shown, record = first["trees"][0], records[0]
    end, path = shown["chosen"], []
    while end:
        path.insert(0, shown["text"][end - 1])
        end = shown["parent"][end - 1]
    assert "".join(path) == record["text"]
    pieces = [shown["pieces"][piece] for piece in shown["scorers"][0]["pieces"][0]]
    assert "".join(pieces) == shown["text"][0]
    assert set(shown["usage"]) >= {"sampled_tokens", "seconds"}

    assert run(*draw, "--html", "b.html", "--resume")[0] == 0  # what the file has of them
    assert [tree["chosen"] for tree in data_of(Path("b.html"))["trees"]] == [len(record["steps"]) for record in records]


def test_eval_keeps_its_trees_and_shows_them(run, workdir, demo_models):
    write("t.jsonl", [{"question": PROMPT, "answer": "2"}, {"question": "=1a+1?", "answer": "2"}])
    plan = ["--strategies", "greedy,majority,beam", "--budgets", "2", "--label", "exact", "--answer", "number"]
    arguments = ["eval", *DEMO, "--data", "t.jsonl", *plan, "--out", "ev", "--html", "ev.html"]
    assert run(*arguments)[0] == 0
    trees = data_of(Path("ev.html"))["trees"]
    assert [tree["name"] for tree in trees[:3]] == [
        "problem 0: greedy", "problem 0: samples, seed 0", "problem 0: beam q (demo), N = 2, seed 0",
    ]  # fmt: skip
    assert len(trees) == len(lines("ev/records.jsonl")) == 6
    assert trees[1]["chosen"] is None
    assert trees[2]["chosen"] is not None
    before = Path("ev.html").read_text()
    assert run("eval", "--out", "ev", "--report-only", "--html", "again.html")[0] == 0
    assert Path("again.html").read_text() == before
    Path("ev/trees.jsonl").unlink()
    status, _, err = run("eval", "--out", "ev", "--report-only", "--html", "again.html")
    assert status == 2
    assert "kept no trees" in err


def test_eval_of_responses_has_no_trees(run, workdir):
    write("r.jsonl", [{"question": PROMPT, "responses": ["1"], "answer": "2"}])
    status, _, err = run("eval", "--responses", "r.jsonl", "--pair", "demo", "--out", "ev", "--html", "e.html")
    assert status == 2
    assert "there are none with --responses" in err


def test_a_large_tree_is_said_to_open_folded(workdir, capsys):
    write_page("--out", "large.html", "large", [PageTree("large", [("", "p")], [PageStep(0, "a")] * 6_000)])
    assert "a tree of up to 6,000 steps: opens folded to the chosen path." in capsys.readouterr().err
    assert data_of(Path("large.html"))["folded"] < 6_000
