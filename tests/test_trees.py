"""`prm-search export-tree`: values inferred from a tree by hand, records that train reads, input that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from records import lines, write

import prm_search as ps
from prm_search.cli import main
from prm_search.demo.chains import problems
from prm_search.problems import Judge
from prm_search.training.data import read_rollouts
from prm_search.training.trees import infer, tree_records
from prm_search.tree import Prompt, SearchTree

ASKED = problems(4, split="prm", length=3)


@pytest.fixture
def folder(workdir: Path, demo_models: object) -> Path:
    write("problems.jsonl", [{"id": f"p{i}", "question": p.prompt, "answer": p.answer} for i, p in enumerate(ASKED)])
    return workdir


def by_hand() -> SearchTree:
    """A right answer in three steps (1-2-3), another in two (1-4), a wrong one (1-5-6), a wrong one from the start
    (7-8), and a step that was pruned (9)."""
    tree = SearchTree(Prompt(token_ids=(1, 2)))
    parents = {1: 0, 2: 1, 3: 2, 4: 1, 5: 1, 6: 5, 7: 0, 8: 7, 9: 7}
    texts = {3: "5", 4: "5", 6: "7", 8: "7"}
    for number, parent in parents.items():
        ended = number in texts
        tree.add(
            tree.nodes[parent], (10 + number, 20), text=texts.get(number, ""), finish="stop" if ended else "step"
        )  # fmt: skip
    return tree


# -- values ------------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    tree = by_hand()
    n = tree.nodes
    found = infer(tree, {n[3]: True, n[4]: True, n[6]: False, n[8]: False})
    assert {node.index: step.distance for node, step in found.items()} == {
        1: 1, 2: 1, 3: 0, 4: 0, 5: 1, 6: 1, 7: 2, 8: 2,
    }  # fmt: skip
    assert n[9] not in found
    assert [node.index for node, step in found.items() if step.right] == [1, 2, 3, 4]
    values = {node.index: step.value for node, step in found.items()}
    # 1: 1/2 of the way; 2: another half of the rest; 5: (1 - 1/2) / 2 back; 6: (1 - 1/4) / 2 back, cut at 0; 7, 8: at 0
    assert values == pytest.approx({1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 5: 0.25, 6: 0.0, 7: 0.0, 8: 0.0})
    rewards = {node.index: step.reward for node, step in found.items()}
    assert rewards == pytest.approx({1: 0.5, 2: 0.25, 3: 0.25, 4: 0.5, 5: -0.25, 6: -0.375, 7: -1 / 3, 8: -1 / 3})


def test_no_right_answer_no_values():
    tree = by_hand()
    assert infer(tree, dict.fromkeys((tree.nodes[3], tree.nodes[4]), False)) == {}
    assert infer(SearchTree(Prompt(token_ids=(1,))), {}) == {}


def test_records_of_a_tree():
    tree = by_hand()
    judge = Judge("exact", "number")
    ends = list(tree_records(tree, "5", judge))
    assert [r["node"] for r in ends] == [3, 4, 6, 8]
    assert [r["label"] for r in ends] == [1, 1, 0, 0]
    first, _, third, _ = ends
    assert (first["prompt_ids"], first["response_ids"]) == ([1, 2], [11, 20, 12, 20, 13, 20])
    assert (first["step_ends"], first["answer"], first["reference_answer"]) == ([2, 4, 6], "5", "5")
    assert first["step_rewards"] is None  # nothing scored this tree
    assert third["inferred_values"] == pytest.approx([0.5, 0.25, 0.0])
    assert third["steps_to_right"] == [1, 1, 1]
    every = list(tree_records(tree, "5", judge, nodes="all"))
    assert [r["node"] for r in every] == list(range(1, 10))
    assert [r["node"] for r in every if "label" in r] == [3, 4, 6, 8]
    assert every[-1]["inferred_values"] == pytest.approx([0.0, None])
    assert all("label" not in r and "inferred_values" not in r for r in tree_records(tree))


def test_a_cut_response_is_wrong():
    tree = SearchTree(Prompt(token_ids=(1,)))
    tree.add(tree.root, (5,), text="5", finish="length")
    (record,) = tree_records(tree, "5", Judge("exact", "number"))
    assert (record["label"], record["answer"], record["inferred_values"]) == (0, None, [None])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="nodes='some'"):
        tree_records(by_hand(), nodes="some")
    with pytest.raises(ValueError, match="label"):
        tree_records(by_hand(), "5")


# -- the command -------------------------------------------------------------------------------------------------------

SEARCH = ["generate", "--policy", "demo", "--pair", "demo", "--prompts-file", "problems.jsonl", "--tree",
          "--width", "2", "--expansions", "4", "--temperature", "1"]  # fmt: skip
EXPORT = ["export-tree", "trees.jsonl", "--data", "problems.jsonl", "--label", "exact"]


def test_search_export_train(folder, capsys):
    """The commands in a row; records have the tree's own numbers, and training reads them."""
    assert main([*SEARCH, "--out", "trees.jsonl"]) == 0
    assert main([*EXPORT, "--out", "rollouts.jsonl"]) == 0
    assert "responses to 4 problems" in capsys.readouterr().err
    records, trees = lines("rollouts.jsonl"), [json.dumps(r["tree"]) for r in lines("trees.jsonl")]
    assert [r["index"] for r in records] == list(range(len(records)))
    assert {r["label"] for r in records} == {0, 1}
    for record in records:
        problem = ASKED[record["problem"]]
        assert record["id"] == f"p{record['problem']}"
        assert record["label"] == (record["finish"] == "stop" and record["answer"] == problem.answer)
        node = SearchTree.from_json(trees[record["problem"]]).nodes[record["node"]]
        assert record["response_ids"] == node.path_ids()
        assert record["step_rewards"] == pytest.approx([step.reward for step in node.path()])
        assert record["step_q"][-1] == pytest.approx(node.q)
        assert record["step_ends"][-1] == len(record["response_ids"])
        known = record["inferred_values"]
        assert (known[-1] == 1) if record["label"] else (known[-1] is None or known[-1] < 1)
    assert [row.label for row in read_rollouts("rollouts.jsonl")] == [bool(r["label"]) for r in records]
    status = main(["train", "--model", "demo", "--rollouts", "rollouts.jsonl", "--out", "prm", "--lr", "1e-3",
                   "--holdout", "0", "--batch", "4"])  # fmt: skip
    assert status == 0
    pair = ps.ImplicitPRM.from_pretrained("prm")
    assert pair.score([ASKED[0].prompt], [ASKED[0].steps[0]])[0].reward != 0


def test_search_by_mcts_export_train_and_search_again(folder, capsys):
    """The loop of docs/training.md, one command each: the pair that it trains is what the second search reads."""
    ways = ["--strategy", '{"name": "mcts", "simulations": 6}', "--value", "min", "--temperature", "1"]
    ways += ["--max-new-tokens", "24", "--budget", "120"]
    search = ["generate", "--policy", "demo", "--prompts-file", "problems.jsonl", *ways]
    assert main([*search, "--pair", "demo", "--tree", "--out", "trees.jsonl"]) == 0
    assert main([*EXPORT, "--answer", "prm_search.demo.chains:answer", "--out", "searched.jsonl"]) == 0
    assert {record["label"] for record in lines("searched.jsonl")} == {0, 1}
    status = main(["train", "--model", "demo", "--rollouts", "searched.jsonl", "--out", "prm-2", "--lr", "1e-3",
                   "--holdout", "0", "--batch", "4", "--delimiter", ";"])  # fmt: skip
    assert status == 0
    assert main([*search, "--pair", "prm-2", "--out", "again.jsonl"]) == 0
    first, again = lines("trees.jsonl"), lines("again.jsonl")
    assert len(again) == len(ASKED)
    assert all(record["text"] for record in again)
    assert [record["value"] for record in first] != [record["value"] for record in again]


def test_a_tree_by_itself_and_without_labels(folder, capsys):
    tree = by_hand()
    Path("tree.json").write_text(tree.to_json(indent=2))
    assert main(["export-tree", "tree.json", "--nodes", "all", "--out", "all.jsonl"]) == 0
    assert "9 records, without labels" in capsys.readouterr().err
    assert [r["node"] for r in lines("all.jsonl")] == list(range(1, 10))
    with pytest.raises(ValueError, match="label"):
        read_rollouts("all.jsonl")


BAD = {
    "no trees in it": (["plain.jsonl"], "--tree"),
    "no file": (["none.jsonl"], "none.jsonl"),
    "no tree": (["odd.jsonl"], "odd.jsonl, line 1"),
    "no json": (["broken.json"], "broken.json"),
    "another problem": (["tree.json", "--data", "problems.jsonl", "--label", "exact"], "problems.jsonl"),
    "nodes": (["tree.json", "--nodes", "some"], "--nodes"),
    "system": (["tree.json", "--system", "x"], "--chat"),
    "label": (["tree.json", "--data", "problems.jsonl", "--label", "x"], "--label"),
    "nothing finished": (["stump.json"], "stump.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_file(case, folder, capsys):
    Path("plain.jsonl").write_text('{"prompt": "a", "text": "b"}\n')
    Path("odd.jsonl").write_text('{"tree": {"nodes": [], "version": 1}}\n')
    Path("broken.json").write_text('{"tree": ')
    Path("tree.json").write_text(by_hand().to_json())
    Path("stump.json").write_text(SearchTree(Prompt(token_ids=(1,))).to_json())
    args, word = BAD[case]
    assert main(["export-tree", *args, "--out", "out.jsonl"]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
    assert not list(folder.glob("out.jsonl*"))


def test_an_existing_file_is_kept(folder, capsys):
    Path("out.jsonl").write_text("mine\n")
    Path("tree.json").write_text(by_hand().to_json())
    assert main(["export-tree", "tree.json", "--out", "out.jsonl"]) == 2
    assert "out.jsonl exists" in capsys.readouterr().err
    assert Path("out.jsonl").read_text() == "mine\n"
