"""The JSON record of a search tree, checked field by field before a tree is made of it. No node is known here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

FINISHES = ("step", "stop", "length", "budget", "weak")

Check = tuple[str, Callable[[Any], bool]]  # what is needed, in words, and whether a value is that


def _int(value: Any, most: int = (1 << 63) - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, float) or (_int(abs(value)) if isinstance(value, int) else False)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(_int(token, (1 << 31) - 1) for token in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _lineages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_int(each, (1 << 64) - 1) for each in value)


def _hexadecimal(value: Any) -> bool:
    try:
        return isinstance(value, str) and bytes.fromhex(value) is not None
    except ValueError:
        return False


def _none_or(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _by_id(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _each(fits)(value) and all(key.isdecimal() and key.isascii() for key in value)


def _pieces(value: Any) -> bool:
    return isinstance(value, dict) and _by_id(_text)(value.get("text")) and _by_id(_hexadecimal)(value.get("bytes", {}))


_COUNT: Check = ("an integer >= 0", _int)
_TREE: dict[str, Check] = {
    "version": ("1", lambda value: _int(value) and value == 1),
    "prompt": ("an object", lambda value: isinstance(value, dict)),
    "occurrence": _COUNT,
    "primary": ("a text", _text),
    "nodes": ("a list of at least one node", lambda value: isinstance(value, list) and bool(value)),
}
_TREE_OPTIONAL: dict[str, Check] = {  # trees of older versions have none
    "pieces": ('an object with "text" of token ids, and "bytes", for each vocabulary', _each(_pieces)),
    "log_z": ("a number or null", _none_or(_number)),
    "notes": ("a list of texts", lambda value: isinstance(value, list) and all(map(_text, value))),
}
_NODE: dict[str, Check] = {
    "token_ids": ("a list of token ids", _ids),
    "text": ("a text", _text),
    "logprobs": ("a list of numbers or null", _none_or(_numbers)),
    "sampler": ("a text or null", _none_or(_text)),
    "rewards": ("an object with a list of numbers for each pair", _each(_numbers)),
    "reward_ids": ("an object with a list of token ids for each pair", _each(_ids)),
    "reward": ("an object with a number for each pair", _each(_number)),
    "q": ("an object with a number for each pair", _each(_number)),
    "value": ("a number or null", _none_or(_number)),
    "lineages": ("a list of at least one integer from 0 to 2**64 - 1", _lineages),
    "drawn": _COUNT,
    "rollout": ("true or false", lambda value: isinstance(value, bool)),
}
_NODE_OPTIONAL: dict[str, Check] = {
    "confidences": ("a list of numbers or null", _none_or(_numbers)),
    "hidden": _COUNT,
    "text_bytes": ("bytes in hexadecimal", _hexadecimal),
    "weight": ("a number or null", _none_or(_number)),
}


def check_tree(record: Any) -> None:
    """Check what JSON has for a tree: every field's kind, parents that come before their children, and lengths.

    The fields of the prompt are left to Prompt.

    Args:
        record: see SearchTree.to_json.

    Raises:
        ValueError: a field is missing or wrong. The message names it: "nodes[3].drawn is -1: ...".
    """
    if not isinstance(record, dict):
        raise ValueError(f"an object is needed, got {type(record).__name__}")
    _check("", record, _TREE, _TREE_OPTIONAL)
    for index, node in enumerate(record["nodes"]):
        where = f"nodes[{index}]"
        if not isinstance(node, dict):
            raise ValueError(f"{where} is {node!r:.80}: an object is needed")
        _check(f"{where}.", node, _place(index) | _NODE, _NODE_OPTIONAL)
        for name, values, count in _lists(node):
            if len(values) != count:
                raise ValueError(f"{where}.{name} has {len(values)} entries for {count} tokens")
        for name in ("reward", "q"):
            if node[name].keys() != node["rewards"].keys():
                raise ValueError(
                    f"{where}.{name} has the pairs {sorted(node[name])} and rewards {sorted(node['rewards'])}: "
                    "the same are needed"
                )
        if index == 0 and node["token_ids"]:
            raise ValueError(f"{where}.token_ids is {node['token_ids']!r:.80}: the root holds no tokens")


def _check(where: str, record: Mapping[str, Any], needed: Mapping[str, Check], optional: Mapping[str, Check]) -> None:
    for name in needed:
        if name not in record:
            raise ValueError(f"{where}{name} is missing")
    for name, (words, fits) in (*needed.items(), *optional.items()):
        if name in record and not fits(record[name]):
            raise ValueError(f"{where}{name} is {record[name]!r:.80}: {words} is needed")


def _place(index: int) -> dict[str, Check]:
    """Checks of what depends on a node's place: the root comes first, and no parent after its child."""
    if index == 0:
        nothing = ("null, as it is the root,", lambda value: value is None)
        return {"parent": nothing, "finish": nothing}
    return {
        "parent": (f"the index of a node before it, 0 to {index - 1},", lambda value: _int(value, index - 1)),
        "finish": (f"one of {', '.join(FINISHES)}", lambda value: value in FINISHES),
    }


def _lists(node: Mapping[str, Any]) -> Iterator[tuple[str, list[Any], int]]:
    """Lists with one entry a token: their names, themselves, and the tokens."""
    tokens = len(node["token_ids"])
    for name in ("logprobs", "confidences"):
        if node.get(name) is not None:
            yield name, node[name], tokens
    for pair, rewards in node["rewards"].items():
        yield f"rewards[{pair!r}]", rewards, len(node["reward_ids"][pair]) if pair in node["reward_ids"] else tokens
