"""The trees of files that prm-search, or SearchTree.to_json, wrote, as a page shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..driver.result import Result
from ..tree import FINISHES, Node, SearchTree
from ..viewer.page_tree import COSTS, PageStep, PageTree, costs_of
from . import BadInput
from .records import reason
from .tree_files import tree_records_of

NO_TREE = "The file keeps no tree of this search (generate --tree does): the answer's steps, and other candidates."
KINDS = (
    "a tree (SearchTree.to_json), a result of generate (with --tree its whole tree), a line of the trees.jsonl that "
    "eval --html writes, or a result of score is needed"
)


def page_trees(paths: Sequence[str]) -> Iterator[PageTree]:
    """Every tree of some files, in order.

    Args:
        paths: JSON Lines, or a file that holds one tree; "-" is standard input, JSON Lines.

    Raises:
        BadInput: a file cannot be read, or a record is neither a tree nor a result; which one is said, and why.
    """
    for path in paths:
        empty = True
        for where, record in tree_records_of(path):
            empty = False
            yield page_tree(record, where, _title(path, record, alone=where == path))
        if empty:
            raise BadInput(f"{path} holds no trees")


def page_tree(record: Mapping[str, Any], where: str, name: str) -> PageTree:
    """A tree of one record. Raises BadInput that names it where the record is neither a tree nor a result."""
    if isinstance(record.get("tree"), Mapping) or "nodes" in record:
        return _of_tree(record, where, name)
    try:
        if "candidates" in record and isinstance(record.get("steps"), list):
            return _of_result(record, name)
        if "token_rewards" in record and "step_ends" in record:
            return _of_scores(record, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{where}: a result that is damaged ({type(error).__name__}: {reason(error)})") from error
    raise BadInput(f"{where} is neither a tree nor a result: {KINDS}")


def _of_tree(record: Mapping[str, Any], where: str, name: str) -> PageTree:
    try:
        tree = SearchTree.from_json(json.dumps(record.get("tree", record)))
    except ValueError as error:
        raise BadInput(f"{where}: {reason(error)}") from error
    chosen = chosen_node(tree, record.get("steps"))
    return PageTree.of(tree, name, chosen=chosen, facts=_facts(record), usage=_usage(record))


def result_page(result: Result, name: str, facts: Sequence[tuple[str, str]] = ()) -> PageTree:
    """A result of this run.

    Args:
        result: the result.
        name: what the page calls it.
        facts: (name, text), beside its answer and why it stopped.
    """
    told = _facts({"answer": result.answer, "stopped": result.stopped})
    return PageTree.of(result.tree, name, chosen=result.node, facts=[*told, *facts], usage=costs_of(result.usage))


def step_record(node: Node) -> dict[str, Any]:
    """A step of the chosen path, as results have it: `chosen_node` finds it again."""
    step: dict[str, Any] = {"text": node.text, "tokens": len(node.token_ids), "value": node.value}
    if node.scored_by(node.tree.primary):
        step |= {"reward": node.reward, "q": node.q}
    return step


def chosen_node(tree: SearchTree, steps: Any) -> Node | None:
    """The end of the path with these steps, as a result has them; None where the tree has none such."""
    ends = [tree.root]
    for step in steps if isinstance(steps, list) else []:
        if not isinstance(step, Mapping):
            return None
        children = [child for node in ends for child in node.children if child.text == step.get("text")]
        same = [child for child in children if child.value == step.get("value")]
        ends = same or children
    return next((node for node in ends if node.finished), next(iter(ends), None)) if ends != [tree.root] else None


def _of_result(record: Mapping[str, Any], name: str) -> PageTree:
    """A result without its tree: the chosen path by its steps, and the other candidates whole."""
    steps: list[PageStep] = []
    for step in record["steps"]:
        numbers = {key: {"reward": float(step[key])} for key in ("reward", "q") if step.get(key) is not None}
        steps.append(
            PageStep(
                len(steps), str(step["text"]), _count(step["tokens"]), value=_float(step.get("value")),
                rewards=numbers.get("reward", {}), q=numbers.get("q", {}),
            )
        )  # fmt: skip
    chosen = len(steps) or None
    for place, candidate in enumerate(record["candidates"]):
        if place == 0 and steps:
            steps[-1].finish, steps[-1].count = _finish(candidate), _count(candidate["count"]) or 1
            continue
        steps.append(
            PageStep(
                0, str(candidate["text"]), None, _finish(candidate), _count(candidate["count"]) or 1,
                _float(candidate.get("value")),
            )
        )  # fmt: skip
    return PageTree(
        name, _prompt(record.get("prompt")), steps, "reward", chosen, _facts(record), _usage(record), [NO_TREE]
    )


def _of_scores(record: Mapping[str, Any], name: str) -> PageTree:
    """A scored response: one path."""
    tokens, rewards, q = ([*record[key]] for key in ("tokens", "token_rewards", "q"))
    ends, step_rewards = record["step_ends"], record["step_rewards"]
    if not len(tokens) == len(rewards) == len(q) or len(ends) != len(step_rewards) or ends[-1:] != [len(tokens)]:
        raise ValueError("its lists are of different lengths")
    steps = []
    for place, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        pieces = [str(token) for token in tokens[start:end]]
        token_rewards = [_float(reward, nan=True) for reward in rewards[start:end]]
        steps.append(
            PageStep(
                place, "".join(pieces), end - start, "stop" if end == len(tokens) else "step",
                rewards={"reward": _float(step_rewards[place], nan=True)}, q={"reward": _float(q[end - 1], nan=True)},
                token_rewards={"reward": token_rewards}, pieces={"reward": pieces},
            )
        )  # fmt: skip
    asked = record.get("prompt", "(score keeps no prompts)")
    return PageTree(name, _prompt(asked), steps, "reward", len(steps), [("reward", f"{record['reward']}")])


def _title(path: str, record: Mapping[str, Any], *, alone: bool) -> str:
    """The name of a tree: its file, and the record's own title, id or number."""
    file = "standard input" if path == "-" else Path(path).name
    if isinstance(record.get("title"), str):
        return f"{file}: {record['title']}"
    number = record.get("id", record.get("index"))
    return file if alone or number is None else f"{file}: {number if 'id' in record else f'prompt {number}'}"


def _prompt(asked: Any) -> list[tuple[str, str]]:
    if isinstance(asked, list) and all(isinstance(message, Mapping) for message in asked):
        return [(str(message.get("role", "")), str(message.get("content", ""))) for message in asked]
    return [("", asked if isinstance(asked, str) else f"({len(asked)} token ids)" if isinstance(asked, list) else "")]


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    values = {name: record.get(name) for name in ("answer", "stopped")}
    return [(name, str(value)) for name, value in values.items() if value is not None]


def _usage(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Costs that are objects of numbers; others are left out, as records of other versions have them."""
    usage = {}
    for cost in COSTS:
        numbers = record.get(cost)
        if isinstance(numbers, Mapping):
            known = {str(name): _float(number) for name, number in numbers.items()}
            usage[cost] = {name: number for name, number in known.items() if number is not None}
    return usage


def _finish(candidate: Mapping[str, Any]) -> str:
    finish = candidate["finish"]
    if finish not in FINISHES:
        raise ValueError(f"finish is {finish!r:.80}: one of {', '.join(FINISHES)} is needed")
    return str(finish)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"an integer is needed, got {value!r:.80}")
    return value


def _float(value: Any, *, nan: bool = False) -> Any:
    """A number; None for null, or where nan is True NaN: JSON Lines of ours have null for it."""
    if value is None:
        return float("nan") if nan else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a number is needed, got {value!r:.80}")
    return float(value)
