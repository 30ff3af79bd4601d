"""Search trees as training data: every response of a tree, with what is known of each of its steps. No torch.

The values that are inferred are those of ReST-MCTS* (arXiv 2406.03816, "quality value" and "weighted reward"), as its
released code computes them for a whole tree. With v_0 = 0 at the prompt,

    v_k = max(0, v_{k-1} + w_k)          w_k = (1 - v_{k-1}) / (m_k + 1) * (1 - 2 r_k)

where r_k is 0 if the tree holds a right answer below step k, else 1, and the reasoning distance m_k is the number of
steps from step k to the nearest right answer below it. Without a right answer below step k, m_k counts from the last
step before it that has one below. So the value is 1 at a right answer, grows evenly on the shortest way there, and
falls with every step after the first wrong turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..tree import Node, SearchTree
from .rollouts import Label

NODES = ("ends", "all")


@dataclass(frozen=True)
class Inferred:
    """The values of a step that a tree with known outcomes implies.

    Attributes:
        value: v_k, in [0, 1].
        reward: w_k, the weighted reward.
        distance: m_k.
        right: whether a right answer is below, or is this.
    """

    value: float
    reward: float
    distance: int
    right: bool


def infer(tree: SearchTree, right: dict[Node, bool]) -> dict[Node, Inferred]:
    """Values of steps from outcomes.

    Args:
        tree: any.
        right: its finished nodes, and whether the answer of each is right.

    Returns:
        Of each node with a finished node below it, or that is one; of none where no answer is right. A step that was
        pruned before any answer has no value: nothing is known of it.
    """
    needed: dict[Node, int] = {}  # steps to a right answer, from nodes that have one below
    known: set[Node] = set()
    for node in reversed(tree.nodes):  # children come after their parents
        below = [needed[child] + 1 for child in node.children if child in needed]
        if right.get(node, False):
            below.append(0)
        if below:
            needed[node] = min(below)
        if node in right or any(child in known for child in node.children):
            known.add(node)
    inferred: dict[Node, Inferred] = {}
    if tree.root not in needed:  # no answer is right
        return inferred
    distance: dict[Node, int] = {tree.root: needed[tree.root]}
    for node in tree.nodes[1:]:
        parent = node.parent
        if node not in known or parent is None:
            continue
        good = node in needed
        distance[node] = needed[node] if good else distance[parent]
        before = inferred[parent].value if parent in inferred else 0.0
        reward = (1 - before) / (distance[node] + 1) * (1 if good else -1)
        inferred[node] = Inferred(max(0.0, before + reward), reward, distance[node], good)
    return inferred


def tree_records(
    tree: SearchTree, answer: str | None = None, label: Label | None = None, nodes: str = "ends"
) -> Iterator[dict[str, Any]]:
    """The tree's responses as records; with a label they are rollouts, which `train` reads.

    Args:
        tree: from a search, or from_json; its prompt has token ids.
        answer: the reference answer; None: neither labels nor inferred values.
        label: see problems.Judge; needed with an answer.
        nodes: "ends": whole responses only (ended, or cut by a limit or budget); "all": the path to every node.

    Returns:
        In the order of the nodes: `node`, its place in the tree; `prompt_ids`, `response_ids`, `response`, `finish`,
        and `count`, how often it was drawn; `step_ends`, where in response_ids each step ends (exclusive); for each
        step `step_rewards` and `step_q` of the tree's own pair and `step_values`, what the search ranked it by (null
        where there are none). With an answer: `answer`, the one found, `reference_answer` and `label` (0 for a response
        that was cut), those three of whole responses only, and for each step `inferred_values`, `inferred_rewards` and
        `steps_to_right` (see Inferred; null where nothing is known).

    Raises:
        ValueError: nodes is neither, an answer comes without label, or the prompt has no token ids.
    """
    if nodes not in NODES:
        raise ValueError(f"nodes={nodes!r} is unknown; it is one of {', '.join(NODES)}")
    if answer is not None and label is None:
        raise ValueError("label is needed with an answer")
    judged: dict[Node, tuple[str | None, bool]] = {}
    if answer is not None and label is not None:
        judged = {
            node: label(node.path_text(), answer) if node.finish == "stop" else (None, False)
            for node in tree.nodes
            if node.finished
        }
    inferred = infer(tree, {node: right for node, (_, right) in judged.items()})
    return (_record(node, answer, judged, inferred) for node in tree.nodes[1:] if node.finished or nodes == "all")


def _record(
    node: Node, answer: str | None, judged: dict[Node, tuple[str | None, bool]], inferred: dict[Node, Inferred]
) -> dict[str, Any]:
    path = node.path()
    scored = node.scored_by(node.tree.primary)
    record: dict[str, Any] = {
        "node": node.index,
        "prompt_ids": list(node.tree.prompt_ids),
        "response_ids": node.path_ids(),
        "response": node.path_text(),
        "finish": node.finish,
        "count": node.count,
        "step_ends": [step.end for step in path],
        "step_rewards": [step.reward for step in path] if scored else None,
        "step_q": [step.q for step in path] if scored else None,
        "step_values": [step.value for step in path],
    }
    if answer is None:
        return record
    if node in judged:
        extracted, right = judged[node]
        record |= {"answer": extracted, "reference_answer": answer, "label": int(right)}
    steps = [inferred.get(step) for step in path]
    record["inferred_values"] = [None if step is None else step.value for step in steps]
    record["inferred_rewards"] = [None if step is None else step.reward for step in steps]
    record["steps_to_right"] = [None if step is None else step.distance for step in steps]
    return record
