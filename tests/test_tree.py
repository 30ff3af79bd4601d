"""Prompt, Node, SearchTree, and the records that pass to a policy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fakes import sampling

from prm_search.protocols import Request, Segment, commit
from prm_search.rng import child_lineage
from prm_search.tree import Node, Prompt, SearchTree


def small_tree() -> tuple[SearchTree, Node, Node, Node]:
    tree = SearchTree(Prompt(text="p", token_ids=(7, 8)), occurrence=2)
    a = tree.add(tree.root, [1, 2], text="ab", logprobs=np.array([-0.5, -0.25]), sampler="m", lineage=3)
    b = tree.add(tree.root, [4], text="d", finish="stop", rollout=True)
    c = tree.add(a, [5, 6, 9], text="xyz", finish="length")
    return tree, a, b, c


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ("hello", "text", "hello"),
        ([3, 4], "token_ids", (3, 4)),
        (np.array([3, 4]), "token_ids", (3, 4)),
        ([{"role": "user", "content": "x"}], "messages", ({"role": "user", "content": "x"},)),
    ],
)
def test_prompt_of(given: object, field: str, expected: object) -> None:
    assert getattr(Prompt.of(given), field) == expected


@pytest.mark.parametrize("given", ["", [], {"text": ""}, {"token_ids": ()}, {"messages": ()}, {}])
def test_empty_prompts_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"empty prompt|needs one of"):
        Prompt(**given) if isinstance(given, dict) else Prompt.of(given)


@pytest.mark.parametrize("given", [3, None, [1.5], ["a", "b"], [True], {"role": "user"}])
def test_prompts_of_another_kind_are_refused(given: object) -> None:
    with pytest.raises(TypeError, match="prompt must be"):
        Prompt.of(given)


def test_prompt_takes_text_or_messages() -> None:
    with pytest.raises(ValueError, match="not both"):
        Prompt(text="a", messages=({"role": "user", "content": "x"},))


def test_paths_and_positions() -> None:
    tree, a, b, c = small_tree()
    assert [node.index for node in tree] == [0, 1, 2, 3]
    assert c.path() == [a, c]
    assert tree.root.path() == []
    assert c.path_ids() == [1, 2, 5, 6, 9]
    assert c.path_text() == "abxyz"
    assert (c.start, c.end, c.depth) == (2, 5, 2)
    assert tree.root.children == [a, b]
    assert (tree.root.finished, a.finished, b.finished, c.finished) == (False, False, True, True)
    assert a.count == 1


def test_rewards_telescope() -> None:
    tree, a, _, c = small_tree()
    with pytest.raises(ValueError, match="parent before the node"):
        c.set_rewards("prm", np.ones(3))
    a.set_rewards("prm", np.array([0.5, -1.5]))
    c.set_rewards("prm", np.array([1.0, 2.0, 0.25]))
    assert (a.reward, a.q) == (-1.0, -1.0)
    assert (c.reward, c.q) == (3.25, 2.25)
    assert c.token_rewards.dtype == np.float32
    c.set_rewards("other", np.zeros(7), reward=0.0) if a.scored_by("other") else a.set_rewards("other", np.ones(9), 4.0)
    assert (a.reward_of("other"), a.q_of("other")) == (4.0, 4.0)
    assert (tree.root.q, tree.root.reward, tree.root.token_rewards.size) == (0.0, 0.0, 0)
    with pytest.raises(KeyError):
        c.q_of("nobody")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": []}, "at least one token"),
        ({"finish": "eos"}, "finish='eos'"),
        ({"logprobs": np.zeros(2)}, "logprobs has 2"),
        ({"parent": "finished"}, "parent is finished"),
        ({"parent": "stranger"}, "another tree"),
    ],
)
def test_add_refuses(change: dict[str, object], message: str) -> None:
    tree, _, b, _ = small_tree()
    given = {"parent": tree.root, "token_ids": [1], **change}
    given["parent"] = {"finished": b, "stranger": SearchTree("q").root}.get(given["parent"], tree.root)
    with pytest.raises(ValueError, match=message):
        tree.add(given.pop("parent"), given.pop("token_ids"), **given)
    assert len(tree.nodes) == 4


def test_prompt_ids_need_a_policy() -> None:
    with pytest.raises(ValueError, match="no token ids yet"):
        _ = SearchTree("text").prompt_ids


def test_streams_of_equal_prompts_differ() -> None:
    first, second = (SearchTree(Prompt(token_ids=(1, 2)), occurrence=i) for i in (0, 1))
    assert first.stream == SearchTree(Prompt(token_ids=(1, 2), text="other words")).stream != second.stream


def test_json_round_trip() -> None:
    tree, a, _, c = small_tree()
    a.set_rewards("prm", np.array([0.1, 0.2], np.float32))
    c.set_rewards("prm", np.array([0.3, 0.4, -7.0], np.float32))
    a.lineages, a.drawn, a.value = (3, 2**63 + 1), 4, 0.125
    tree.primary = "prm"
    back = SearchTree.from_json(tree.to_json())
    assert back.to_json() == tree.to_json()
    assert json.loads(tree.to_json(indent=2)) == json.loads(tree.to_json())
    again = back.nodes[a.index]
    assert again.lineages == a.lineages
    assert again.logprobs.tolist() == [-0.5, -0.25]
    assert again.token_rewards.dtype == np.float32
    assert again.token_rewards.tolist() == a.token_rewards.tolist()
    assert back.nodes[c.index].q == c.q
    assert back.nodes[c.index].path_ids() == c.path_ids()
    assert back.stream == tree.stream


def test_json_of_messages_and_infinities() -> None:
    tree = SearchTree(Prompt(messages=({"role": "user", "content": "é\n"},), token_ids=(1,)))
    node = tree.add(tree.root, [2])
    node.set_rewards("prm", np.array([-np.inf]))
    back = SearchTree.from_json(tree.to_json())
    assert back.prompt == tree.prompt
    assert back.nodes[1].q == -np.inf


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "null", '{"version":2,"prompt":{},"nodes":[]}'])
def test_from_json_refuses_what_is_not_a_tree(text: str) -> None:
    with pytest.raises(ValueError, match="not a search tree"):
        SearchTree.from_json(text)


@pytest.mark.parametrize(
    ("index", "field", "wrong"),
    [
        (1, "parent", 2), (1, "parent", 1), (1, "parent", -1), (1, "parent", None), (1, "parent", True),
        (0, "finish", "step"), (1, "finish", "done"), (0, "token_ids", [5]), (1, "token_ids", 1.5),
        (1, "token_ids", [-1]), (1, "token_ids", [1.0, 2]), (1, "text", 5), (2, "lineages", []), (2, "lineages", {}),
        (2, "lineages", [None]), (2, "lineages", [-1]), (1, "drawn", "x"), (1, "drawn", -7), (1, "drawn", True),
        (1, "rollout", 0), (1, "logprobs", [-0.5]), (1, "logprobs", "x"), (1, "logprobs", ["x", "y"]),
        (1, "rewards", []), (1, "rewards", {"prm": 1}), (1, "rewards", {"prm": [0.5]}), (1, "reward", {}),
        (1, "q", {"prm": "x"}), (1, "q", {"other": 1.0}), (1, "reward_ids", {"prm": [1.5]}), (1, "value", "x"),
        (1, "weight", []), (1, "hidden", -1), (1, "hidden", 1.5), (1, "text_bytes", "x"), (1, "text_bytes", "ff"),
        (1, "sampler", 5), (0, "parent", 0),
    ],
)  # fmt: skip
def test_from_json_names_the_field_and_the_node(index: int, field: str, wrong: object) -> None:
    tree, a, _, _ = small_tree()
    a.set_rewards("prm", np.array([0.1, 0.2], np.float32))
    record = json.loads(tree.to_json())
    SearchTree.from_json(json.dumps(record))
    record["nodes"][index][field] = wrong
    with pytest.raises(ValueError, match=rf"nodes\[{index}\]\.{field}\b"):
        SearchTree.from_json(json.dumps(record))


@pytest.mark.parametrize("field", ["parent", "token_ids", "text", "rewards", "q", "lineages", "finish"])
def test_from_json_names_a_field_that_is_missing(field: str) -> None:
    record = json.loads(small_tree()[0].to_json())
    del record["nodes"][2][field]
    with pytest.raises(ValueError, match=rf"nodes\[2\]\.{field} is missing"):
        SearchTree.from_json(json.dumps(record))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("nodes", 1.5), ("nodes", {}), ("nodes", []), ("occurrence", "x"), ("primary", None), ("notes", [1]),
        ("log_z", "x"), ("version", True), ("prompt", []), ("prompt", {}), ("prompt", {"token_ids": [1.5]}),
        ("prompt", {"other": 1}),
    ],
)  # fmt: skip
def test_from_json_names_the_field_of_the_tree(field: str, wrong: object) -> None:
    record = json.loads(small_tree()[0].to_json()) | {field: wrong}
    with pytest.raises(ValueError, match=rf"JSON: {field} is "):
        SearchTree.from_json(json.dumps(record))


# -- requests and commits ---------------------------------------------------------------------------------------------


def test_draw_continues_each_lineage() -> None:
    tree = SearchTree(Prompt(token_ids=(1,)))
    node = tree.add(tree.root, [5], lineage=10)
    node.lineages += (20,)
    first = Request.draw(node, 2, sampling())
    assert first.lineages == (10, child_lineage(10, 1, 1), 20, child_lineage(20, 1, 1))
    assert node.drawn == 2
    second = Request.draw(node, [1], sampling())  # one more of the first lineage only
    assert second.lineages == (child_lineage(10, 1, 2),)
    assert node.drawn == 3


def test_draw_caps() -> None:
    node = SearchTree(Prompt(token_ids=(1,))).root
    request = Request.draw(node, 3, sampling(max_new_tokens=4), caps=[2, 4, 9], cap_reason="budget")
    assert request.caps == (2, 4, 4)
    assert request.cap_reasons == ("budget", "length", "length")
    assert Request.draw(node, 2, sampling(max_new_tokens=4)).caps == (4, 4)
    for caps in ([1, 0, 1], [1, 1]):
        before = node.drawn
        with pytest.raises(ValueError, match="caps"):
            Request.draw(node, 3, sampling(), caps=caps)
        assert node.drawn == before
    with pytest.raises(ValueError, match="lineages"):
        Request.draw(node, [1, 1], sampling())


def chain(*steps: str, end: str = "stop") -> list[Segment]:
    made = [Segment([ord(c) for c in step], [-1.0] * len(step), step, "step") for step in steps]
    made[-1].finish = end
    return made


def test_commit_counts_twins_and_keeps_their_lineages() -> None:
    tree = SearchTree(Prompt(token_ids=(1,)))
    request = Request.draw(tree.root, 4, sampling(), until="end")
    made = commit(request, [chain("a", "b"), chain("a", "c"), chain("a", "b"), chain("a", "b", end="length")], "m")
    a, ab, ac, cut = tree.nodes[1:]
    assert made == [[a, ab], [a, ac], [a, ab], [a, cut]]  # equal tokens with another finish are no twins
    assert (a.count, ab.count, ac.count, cut.count) == (4, 2, 1, 1)
    assert a.lineages == request.lineages
    assert ab.lineages == (request.lineages[0], request.lineages[2])
    assert (a.drawn, ab.drawn) == (1, 0)
    assert ab.sampler == "m"
    assert ab.logprobs.dtype == np.float32


def test_commit_merges_within_one_request_only() -> None:
    tree = SearchTree(Prompt(token_ids=(1,)))
    for _ in range(2):
        commit(Request.draw(tree.root, 2, sampling()), [chain("a", end="step")] * 2, "m")
    assert [node.count for node in tree.nodes[1:]] == [2, 2]


def test_commit_without_merging() -> None:
    tree = SearchTree(Prompt(token_ids=(1,)))
    commit(Request.draw(tree.root, 2, sampling(), merge=False), [chain("a")] * 2, "m")
    assert [node.count for node in tree.nodes[1:]] == [1, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")}, {"temperature": -0.1}, {"temperature": float("inf")}, {"top_p": 0.0},
        {"top_p": 1.1}, {"top_p": float("nan")}, {"min_p": -0.1}, {"min_p": 2.0}, {"top_k": -1}, {"top_k": 1.5},
        {"max_new_tokens": 0}, {"max_new_tokens": 2.5},
    ],
)  # fmt: skip
def test_sampling_refuses(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        sampling(**bad)
