"""A path's text is the decoding of its joined bytes, wherever its steps were cut: inside a character too."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_vllm import install
from fakes import EOS, FakePolicy, FakeScorer, SpelledLM, ids, sampling
from hypothesis import given, strategies as st
from spelled import MODEL, POLICIES, TOKENIZER, found

import prm_search as ps
from prm_search.cli import main
from prm_search.drawing import Segment, commit
from prm_search.driver.result import Result
from prm_search.protocols import Request
from prm_search.serving.text import whole_text
from prm_search.steps import StepRule
from prm_search.tokens import TokenText
from prm_search.training.rollouts import Problem, sample_rollouts
from prm_search.training.trees import tree_records
from prm_search.tree import Prompt, SearchTree

BOXED = "so \\boxed{四十二}"
TEXTS = [BOXED, "🧮 ∑ᵢ xᵢ ≤ √2\n\n\U0001f469\u200d\U0001f467 ✓"]
RULES = [*(StepRule(None, max_tokens=n) for n in (1, 2, 3, 4)), StepRule(None, confidence=1.0), StepRule()]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_steps_may_end_inside_a_character_but_texts_and_answers_never_show_it(name: str, rule: StepRule) -> None:
    for text in TEXTS:
        for strategy in (ps.BestOfN(2), ps.Beam(1, 2)):
            options: dict[str, Any] = {"scorer": FakeScorer()} if isinstance(strategy, ps.Beam) else {}
            result = found(POLICIES[name](text), steps=rule, strategy=strategy, answer="boxed", **options)
            assert result.text == text
            assert {node.path_text() for node in result.candidates} == {text}
            assert result.answer == ("四十二" if text is BOXED else None)
            assert SearchTree.from_json(result.tree.to_json()).nodes[result.node.index].path_text() == text


def test_the_steps_do_end_inside_characters() -> None:
    for name in POLICIES:
        nodes = found(POLICIES[name](BOXED), steps=RULES[0]).node.path()
        assert "\ufffd" in "".join(node.text for node in nodes)
        assert b"".join(node.text_bytes for node in nodes) == BOXED.encode()


@pytest.mark.parametrize("select", ["majority", "weighted"])
def test_votes_are_cast_for_whole_characters(select: Any) -> None:
    result = found(POLICIES["hf"](BOXED), steps=RULES[2], scorer=FakeScorer(), select=select, answer="boxed")
    assert [(vote.answer, vote.votes) for vote in result.selection.votes] == [("四十二", 2)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_that_ends_inside_a_character_shows_that_at_the_end_only(name: str) -> None:
    script = [bytes([b]) for b in BOXED.encode()]
    if name == "hf":
        script = [TokenText(TOKENIZER).piece(i) for i in TOKENIZER(BOXED)["input_ids"]]
    for tokens in range(8, len(script)):
        policy = POLICIES[name](BOXED)
        result = found(policy, steps=StepRule(None, max_tokens=3), strategy=ps.BestOfN(1), budget=tokens)
        assert result.node.finish == "budget"
        assert result.text == b"".join(script[:tokens]).decode("utf-8", "replace")
        assert found(policy, steps=StepRule(None, max_tokens=3), max_new_tokens=tokens).text == result.text


def test_rollouts_and_their_labels_are_of_the_whole_text() -> None:
    seen = []

    def label(text: str, answer: str) -> tuple[str | None, bool]:
        seen.append(text)
        return text, text == answer

    problem = Problem(Prompt(token_ids=(5,)), BOXED)
    how = sampling(steps=StepRule(None, max_tokens=2), temperature=0.0, max_new_tokens=64)
    for name in ("fake", "hf", "vllm"):
        (rollout,) = sample_rollouts([problem], policy=POLICIES[name](BOXED), n=1, sampling=how, label=label)
        assert (rollout.text, rollout.label, rollout.record()["response"]) == (BOXED, True, BOXED)
    assert seen == [BOXED] * 3


def test_records_of_a_tree_that_was_saved_have_the_whole_text() -> None:
    tree = SearchTree.from_json(found(POLICIES["hf"](BOXED), steps=RULES[2]).tree.to_json())
    records = list(tree_records(tree, "四十二", lambda text, answer: (text, answer in text)))
    assert [record["response"] for record in records if record["finish"] == "stop"] == [BOXED]


def test_the_files_that_commands_write_have_the_whole_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model draws bytes of which few are a character."""
    folder, out = str(tmp_path / "model"), tmp_path / "rollouts.jsonl"
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    text = TokenText(TOKENIZER).text
    (tmp_path / "problems.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    limits = ["--step-tokens", "2", "--max-new-tokens", "24", "--temperature", "1"]
    searched = ["--prompt", "a", "--strategy", "best_of_n", "--n", "3", "--select", "majority", "--json", "--tree"]
    assert main(["generate", "--policy", folder, *searched, *limits]) == 0
    record = json.loads(capsys.readouterr().out)
    tree = SearchTree.from_json(json.dumps(record["tree"]))
    whole = {text(node.path_ids()) for node in tree if node.finished}
    assert {each["text"] for each in record["candidates"]} == whole
    assert record["text"] in whole
    assert any("".join(part.text for part in node.path()) != node.path_text() for node in tree)
    problems = ["--data", str(tmp_path / "problems.jsonl"), "--n", "3", "--out", str(out)]
    assert main(["rollout", "--policy", folder, *problems, *limits[2:]]) == 0
    for record in map(json.loads, out.read_text().splitlines()):
        assert record["response"] == text(record["response_ids"])


def test_the_server_tells_the_same_text() -> None:
    result = found(POLICIES["hf"](BOXED), steps=RULES[2])
    assert whole_text(TokenText(TOKENIZER), result.token_ids) == result.text == BOXED


@given(data=st.binary(min_size=1, max_size=24).filter(lambda data: 0 not in data), cuts=st.sets(st.integers(1, 23)))
def test_any_bytes_however_they_are_cut(data: bytes, cuts: set[int]) -> None:
    tree = SearchTree(Prompt(token_ids=(1,)))
    node, bounds = tree.root, [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for begin, end in pairwise(bounds):
        node = tree.add(node, [*data[begin:end]], text=data[begin:end])
    assert node.path_text() == data.decode("utf-8", "replace")
    for twin in (SearchTree.from_json(tree.to_json()), pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree)):
        assert [part.text_bytes for part in twin] == [part.text_bytes for part in tree]
        assert twin.nodes[node.index].path_text() == node.path_text()


def test_trees_saved_without_bytes_and_steps_given_as_text_are_read_as_they_are() -> None:
    tree = SearchTree("p")
    node = tree.add(tree.add(tree.root, [1], text="naï"), [2], text="ve")
    record = json.loads(tree.to_json())
    assert all("text_bytes" not in item for item in record["nodes"])
    assert SearchTree.from_json(json.dumps(record)).nodes[2].path_text() == node.path_text() == "naïve"
    node.text = "f"
    assert (node.text, node.text_bytes, node.path_text()) == ("f", b"f", "naïf")


@pytest.mark.parametrize("wrong", ["e5", "zz", 5, None])
def test_saved_bytes_that_are_none_or_of_another_text_are_refused(wrong: object) -> None:
    tree = SearchTree("p")
    tree.add(tree.root, [1], text="四".encode()[:2])
    record = json.loads(tree.to_json())
    assert record["nodes"][1]["text_bytes"] == "e59b"
    record["nodes"][1] |= {"text_bytes": wrong, "text": "?"}
    with pytest.raises(ValueError, match="not a search tree in JSON"):
        SearchTree.from_json(json.dumps(record))


def test_a_policy_of_ones_own_may_give_text_or_bytes() -> None:
    tree = SearchTree(Prompt(token_ids=(1,)))
    request = Request.draw(tree.root, 2, sampling(max_new_tokens=9), until="end")
    whole = [Segment([1], [], "四", "stop")]
    parts = [Segment([2], [], "四".encode()[:1]), Segment([3], [], "四".encode()[1:], "stop")]
    assert [nodes[-1].path_text() for nodes in commit(request, [whole, parts], None)] == ["四", "四"]


# -- long paths --------------------------------------------------------------------------------------------------------


def long_result(steps: int = 1200) -> Result:
    lm, rule = SpelledLM("四" * (steps // 3)), StepRule(None, max_tokens=1)
    result = found(FakePolicy(lm), strategy=ps.BestOfN(2), steps=rule, max_new_tokens=steps + 8)
    for node in result.node.path():
        node.set_rewards("prm", np.array([0.25] * len(node.token_ids)))
    return result


def test_results_of_long_traces_are_copied_and_pickled_without_recursion() -> None:
    result = long_result()
    assert len(result.node.path()) > sys.getrecursionlimit()
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert twin.tree is not result.tree
        assert twin.node is twin.candidates[0] is twin.tree.nodes[result.node.index]
        assert (twin.text, twin.value, twin.usage) == (result.text, result.value, result.usage)
        assert twin.tree.to_json() == result.tree.to_json() == SearchTree.from_json(result.tree.to_json()).to_json()
        assert [node.sampler for node in twin.tree] == [node.sampler for node in result.tree]
        assert [child.index for child in twin.tree.root.children] == [1]
        twin.node.rewards["prm"][0] = 7.0
        assert result.node.rewards["prm"][0] == 0.25


def test_a_node_brings_its_tree_along_and_several_share_it() -> None:
    tree = SearchTree(Prompt(token_ids=ids("p")), occurrence=3)
    first = tree.add(tree.root, [1], text="a")
    second = tree.add(first, [EOS], finish="stop", lineage=9)
    second.value = 1.5
    one, other, whole = pickle.loads(pickle.dumps((second, first, tree)))
    assert one.parent is other
    assert one.tree is other.tree is whole
    assert (one.value, one.finish, one.lineages, one.depth, one.start, one.end) == (1.5, "stop", (9,), 2, 1, 2)
    assert (whole.stream, whole.occurrence) == (tree.stream, 3)
    whole.add(other, [2])  # it goes on growing
    assert len(tree.nodes) == 3
    shallow = copy.copy(tree)
    shallow.add(shallow.nodes[1], [2])
    assert (len(tree.nodes), len(first.children)) == (3, 1)


@pytest.mark.parametrize("name", ["hf", "vllm", "async vllm"])
def test_what_holds_models_refuses_copies_by_its_name(name: str) -> None:
    policy = POLICIES[name](BOXED)
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=f"a {type(policy).__name__} holds models: it cannot be pickled"):
            copied(policy)
        with pytest.raises(TypeError, match="a PRMGuidance holds models: it cannot be pickled"):
            copied({"prm_guidance": ps.PRMGuidance(FakeScorer())})
    assert copy.copy(policy).token_text is policy.token_text  # a shallow one shares them
    guidance = ps.PRMGuidance(FakeScorer(), seed=3)
    assert copy.copy(guidance) == guidance


def test_results_travel_between_processes() -> None:
    result = long_result()
    script = "import pickle, sys; r = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(pickle.dumps((r, r.text)))"
    answer = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(result), capture_output=True, check=True)
    back, text = pickle.loads(answer.stdout)
    assert text == result.text
    assert back.tree.to_json() == result.tree.to_json()
