"""Packing: items of one prompt as one tree of tokens, so that what their rows begin with is computed once.

The prompt is the tree's trunk; responses branch off where they first differ. The attention mask lets a token see its
ancestors and itself, and a token's depth is its position. So a causal LM gives each token the hidden state that it has
in its own row. Loss and gradients are those of separate rows, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .data import Item, LabelledResponse

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Pack:
    """Items of one prompt, and their rows as a tree of tokens.

    Attributes:
        prompt_ids: the prompt of all rows.
        items: what is packed.
        tokens: ids of the tree's nodes, the prompt's first.
        parents: the node before each; -1 for the root.
        paths: for each item and each of its rows, [T] int64, nodes of the response's tokens.
    """

    prompt_ids: tuple[int, ...]
    items: list[Item] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)
        self.parents = list(range(-1, len(self.tokens) - 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, item: Item) -> None:
        """Add an item's rows to the tree."""
        self.items.append(item)
        self.paths.append(tuple(self._path(row) for row in item.rows))

    def _path(self, row: LabelledResponse) -> np.ndarray:
        node, path = len(self.prompt_ids) - 1, []
        for token in row.response_ids.tolist():
            parent, node = node, self._children.setdefault((node, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
            path.append(node)
        return np.array(path, np.int64)


def packs(items: Iterable[Item], limit: int) -> list[Pack]:
    """Pack items by their prompts, in the order in which prompts first occur.

    Args:
        items: all rows of an item have one prompt.
        limit: tokens; an item that might carry a pack beyond this many begins another one.
    """
    by_prompt: dict[tuple[int, ...], list[Pack]] = {}
    for item in items:
        prompt = item.rows[0].prompt_ids
        of_prompt = by_prompt.setdefault(prompt, [Pack(prompt)])
        if of_prompt[-1].items and len(of_prompt[-1]) + sum(len(row.response_ids) for row in item.rows) > limit:
            of_prompt.append(Pack(prompt))
        of_prompt[-1].add(item)
    return [pack for of_prompt in by_prompt.values() for pack in of_prompt]


def collate_packs(batch: Sequence[Pack]) -> dict[str, torch.Tensor]:
    """Make a batch of P packs with B items of k rows each: R = B * k rows, in the order of `data.collate`.

    Returns:
        input_ids, position_ids [P, L] int64; attention_mask [P, 1, L, L] bool, True where a token is seen; sources [E]
        int64, the places in the flattened [P * L] that predict the E response nodes, and targets [E] int64, their ids;
        response_mask [R, S] bool, the first T places of each row; places [M] int64, of its M true ones the response
        nodes; reference [R, S] fp32, nats, 0 elsewhere; label, weight [B] fp32.
    """
    import torch

    width = max(map(len, batch))
    ids, positions = (torch.zeros((len(batch), width), dtype=torch.long) for _ in range(2))
    seen = np.zeros((len(batch), width, width), np.bool_)
    seen[:, range(width), range(width)] = True  # padding sees itself: a softmax over nothing is no number
    sources: list[int] = []
    targets: list[int] = []
    first: list[int] = []  # of each pack, what to add to a node to have its number among the response nodes
    for index, pack in enumerate(batch):
        depth: list[int] = []
        for node, parent in enumerate(pack.parents):
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                seen[index, node] |= seen[index, parent]
        prompt = len(pack.prompt_ids)
        ids[index, : len(pack)] = torch.tensor(pack.tokens)
        positions[index, : len(pack)] = torch.tensor(depth)
        first.append(len(sources) - prompt)
        sources += [index * width + parent for parent in pack.parents[prompt:]]
        targets += pack.tokens[prompt:]
    parts = range(len(batch[0].items[0].rows))
    rows = [
        (item.rows[part], path[part] + first[index])
        for part in parts
        for index, pack in enumerate(batch)
        for item, path in zip(pack.items, pack.paths, strict=True)
    ]
    mask = torch.zeros((len(rows), max(len(path) for _, path in rows)), dtype=torch.bool)
    reference = torch.zeros(mask.shape)
    for i, (row, path) in enumerate(rows):
        mask[i, : len(path)] = True
        if row.reference is not None:
            reference[i, : len(path)] = torch.from_numpy(np.array(row.reference, np.float32))
    items = [item for pack in batch for item in pack.items]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.from_numpy(seen)[:, None],
        "sources": torch.tensor(sources),
        "targets": torch.tensor(targets),
        "response_mask": mask,
        "places": torch.from_numpy(np.concatenate([path for _, path in rows])),
        "reference": reference,
        "label": torch.tensor([float(item.label) for item in items]),
        "weight": torch.tensor([item.weight for item in items]),
    }
