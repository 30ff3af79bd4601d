"""Search trees for the tests of pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prm_search.tokens.pieces import POLICY, Pieces
from prm_search.tree import Node, Prompt, SearchTree

RIGHT_TO_LEFT = "\u202egnol\u202c שלום"
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def add(parent: Node, text: str, rewards: Sequence[float], *, count: int = 1, finish: str = "step") -> Node:
    """A step with a token for each reward; its text is cut into as many pieces."""
    tree = parent.tree
    ids = [1000 * len(tree.nodes) + place for place in range(len(rewards))]
    size = -(-len(text) // len(ids)) if text else 1
    known = dict(getattr(tree.vocabularies.get(POLICY), "_pieces", {}))
    known |= {token: text[place * size : (place + 1) * size].encode() for place, token in enumerate(ids)}
    tree.vocabularies[POLICY] = Pieces(known)
    node = tree.add(parent, ids, text=text, finish=finish, lineage=len(tree.nodes))
    node.lineages = tuple(range(1, count + 1))
    node.set_rewards("prm", np.array(rewards, np.float32))
    node.value = node.q
    return node


def beam_tree(prompt: str = "What is 2 + 3 * 4?") -> tuple[SearchTree, Node]:
    """A tree with a chosen path of two steps, another finished one, and three pruned steps; and the chosen end."""
    tree = SearchTree(Prompt(text=prompt))
    first = add(tree.root, "First, 3 * 4 = 12.", [0.25, 0.5], count=3)
    pruned = add(tree.root, "First, 2 + 3 = 5.", [-0.5, -0.25])
    add(pruned, "Then 5 * 4 = 20.", [-0.125])
    add(tree.root, "Nothing to do.", [-1.0])
    end = add(first, "Then 2 + 12 = 14.", [0.5, 0.125], finish="stop")
    add(first, "Then 2 + 12 = 15.", [-0.5], finish="stop")
    return tree, end


def hostile_tree() -> tuple[SearchTree, Node]:
    """A tree whose texts try to be markup, turn direction, or are 100 kB long."""
    tree = SearchTree(Prompt(text=HOSTILE))
    first = add(tree.root, HOSTILE, [0.5, 0.5])
    second = add(first, RIGHT_TO_LEFT, [0.25])
    end = add(second, "word " * 20_000, [0.125] * 400, finish="stop")
    return tree, end
