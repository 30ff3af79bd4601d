"""Training data: rollouts read back, and the items that each objective learns from. No torch until they are batched."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import ROUNDING
from ..files import Distinct, parse_json

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class LabelledResponse:
    """One prompt with one response to it.

    Attributes:
        prompt_ids: at least one token.
        response_ids: [T >= 1] int32; a sampled end of sequence is one of them.
        label: whether the response is right.
        reference: [T] fp32, nats, log p of the response's tokens under the reference; None before it is known.
        logprobs: [T] fp32, nats, the same under the policy that sampled them; None where that is not known.
        count: how often it was drawn; it is trained on so often.
    """

    prompt_ids: tuple[int, ...]
    response_ids: np.ndarray
    label: bool
    reference: np.ndarray | None = field(default=None, repr=False)
    logprobs: np.ndarray | None = field(default=None, repr=False)
    count: int = 1

    def __post_init__(self) -> None:
        self.response_ids = np.asarray(self.response_ids, np.int32)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Item:
    """The item that one loss is computed from.

    Attributes:
        rows: (response,) for ce and ipvrm, (chosen, rejected) for dpo and nca, (response, mismatched one) for kto.
        label: of the first.
        weight: of its loss.
    """

    rows: tuple[LabelledResponse, ...]
    label: bool
    weight: float = 1.0


def read_rollouts(path: str | PathLike[str]) -> list[LabelledResponse]:
    """Rows of a file that `prm-search rollout` wrote, in the order of the problems, not that in which they finished.

    Raises:
        OSError: it cannot be read.
        ValueError: the file holds no rollouts, a record stands in it twice, or a record lacks prompt_ids, response_ids
            or label (0 or 1), or has log-probabilities that are none. The message names the line.
    """
    return _read(path, labelled=True)


def read_unlabelled(path: str | PathLike[str]) -> list[LabelledResponse]:
    """Rows of a file of rollouts whose labels, if any, are not read: all are False.

    Raises:
        OSError, ValueError: as read_rollouts, but for labels.
    """
    return _read(path, labelled=False)


def _read(path: str | PathLike[str], *, labelled: bool) -> list[LabelledResponse]:
    indexed = []
    once = Distinct()
    prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{os.fspath(path)}, line {number}"
                index, row = _row(line, where, number, once, labelled)
                row.prompt_ids = prompts.setdefault(row.prompt_ids, row.prompt_ids)  # one copy of each
                indexed.append((index, row))
    if not indexed:
        raise ValueError(f"{os.fspath(path)} holds no rollouts")
    return [row for _, row in sorted(indexed, key=lambda entry: entry[0])]


def _row(line: bytes, where: str, number: int, once: Distinct, labelled: bool) -> tuple[int, LabelledResponse]:
    record = parse_json(line, where)
    try:
        prompt, response = record["prompt_ids"], record["response_ids"]
        label = record["label"] if labelled else 0
        ids = np.array(prompt), np.array(response)
        lists = all(part.ndim == 1 and part.dtype.kind == "i" for part in ids)
        if not lists or any(part.min() < 0 or part.max() >= 1 << 31 for part in ids) or label not in (0, 1):
            raise ValueError
        logprobs = _logprobs(record.get("logprobs"), len(response))
        count = record.get("count", 1)  # of export-tree
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 1 << 31:
            raise ValueError
        row = LabelledResponse(tuple(ids[0].tolist()), ids[1], bool(label), logprobs=logprobs, count=count)
        index = int(record.get("index", number))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{where}: no rollout: prompt_ids and response_ids, lists of at least one id, and label, 0 or 1, are "
            "needed; logprobs, if any, are a finite number <= 0 a response id, and count is an integer >= 1"
        ) from error
    once.add(where, record)
    return index, row


def _logprobs(values: Any, tokens: int) -> np.ndarray | None:
    """Log-probabilities of a record, one a token. Raises ValueError where one is none, but for the rounding of fp32."""
    if values is None:
        return None
    numbers = isinstance(values, list) and all(type(each) in (int, float) for each in values)
    if not numbers:
        raise ValueError
    with np.errstate(over="ignore"):
        logprobs = np.array(values, np.float32)
    if logprobs.shape != (tokens,) or not np.isfinite(logprobs).all() or (logprobs > ROUNDING).any():
        raise ValueError
    return logprobs


def by_prompt(rows: Iterable[LabelledResponse]) -> dict[tuple[int, ...], list[LabelledResponse]]:
    """Rows of each prompt, in order."""
    groups: defaultdict[tuple[int, ...], list[LabelledResponse]] = defaultdict(list)
    for row in rows:
        groups[row.prompt_ids].append(row)
    return dict(groups)


def thin(
    rows: Sequence[LabelledResponse], problems: int | None = None, per_problem: int | None = None
) -> list[LabelledResponse]:
    """The first `per_problem` responses to each of the first `problems` prompts; None for all."""
    groups = list(by_prompt(rows).values())[:problems]
    return [row for group in groups for row in group[:per_problem]]


def split(rows: Sequence[LabelledResponse], share: float) -> tuple[list[LabelledResponse], list[LabelledResponse]]:
    """Rows to train on, and rows held out: those of about `share` of the prompts, by a hash of the prompt's tokens."""
    held: tuple[list[LabelledResponse], list[LabelledResponse]] = ([], [])
    for prompt, group in by_prompt(rows).items():
        position = int.from_bytes(blake2b(json.dumps(prompt).encode(), digest_size=4).digest(), "big") / 2**32
        held[position < share].extend(group)
    return held


def singles(rows: Sequence[LabelledResponse], balanced: str = "none") -> list[Item]:
    """An item a row, for ce and ipvrm.

    Args:
        balanced: "none", or where right and wrong responses get equal weight: "dataset" or "instance" (see
            objectives.balance).

    Raises:
        ValueError: balanced is not one of these, or rows of one label are missing.
    """
    if balanced == "none":
        return [Item((row,), row.label) for row in rows]
    if balanced not in ("dataset", "instance"):
        raise ValueError(f"balanced={balanced!r} is unknown; it is 'none', 'dataset' or 'instance'")
    import torch

    from .objectives import balance

    numbers = {prompt: number for number, prompt in enumerate(by_prompt(rows))}
    group = torch.tensor([numbers[row.prompt_ids] for row in rows]) if balanced == "instance" else None
    weights = balance(torch.tensor([row.label for row in rows], dtype=torch.bool), group).tolist()
    return [Item((row,), row.label, weight) for row, weight in zip(rows, weights, strict=True) if weight]


def pairs(rows: Sequence[LabelledResponse], seed: int = 0) -> list[Item]:
    """A right and a wrong response to one prompt an item, for dpo and nca.

    Every response of a prompt that has both labels is in at least one pair; those of the rarer label are used again
    in turn. Which meet is drawn from the seed.

    Raises:
        ValueError: no prompt has both labels.
    """
    rng = random.Random(seed)
    items = []
    for group in by_prompt(rows).values():
        right, wrong = ([row for row in group if row.label is label] for label in (True, False))
        rng.shuffle(right)
        rng.shuffle(wrong)
        if right and wrong:
            count = max(len(right), len(wrong))
            items += [Item((right[i % len(right)], wrong[i % len(wrong)]), True) for i in range(count)]
    if not items:
        raise ValueError("rollouts: no problem has a right and a wrong response, so there are no pairs")
    return items


def mismatched(rows: Sequence[LabelledResponse], seed: int = 0, balanced: str = "none") -> list[Item]:
    """An item a row, with the response to another prompt as if it were one to this: kto's baseline is made of those.

    Args:
        seed: of the choice.
        balanced: as in singles.

    Raises:
        ValueError: there is only one prompt; or as singles.
    """
    if len(by_prompt(rows)) < 2:
        raise ValueError("rollouts: kto needs responses to two problems at least")
    rng = random.Random(seed)
    items = []
    for single in singles(rows, balanced):
        (row,) = single.rows
        other = rng.choice(rows)
        while other.prompt_ids == row.prompt_ids:
            other = rng.choice(rows)
        items.append(Item((row, LabelledResponse(row.prompt_ids, other.response_ids, False)), row.label, single.weight))
    return items


def collate(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """A batch of B items of k rows each: R = B * k rows, all first ones before all second ones, padded on the right.

    Returns:
        input_ids, attention_mask [R, L] int64; response_mask [R, L - 1] bool, where the *next* token is one of the
        response; reference [R, L - 1] fp32, its log-probability there, 0 elsewhere; label, weight [B] fp32.
    """
    import torch

    rows = [item.rows[part] for part in range(len(items[0].rows)) for item in items]
    shape = len(rows), max(map(len, rows))
    ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros((shape[0], shape[1] - 1), dtype=torch.bool)
    reference = torch.zeros(mask.shape)
    for i, row in enumerate(rows):
        prompt = len(row.prompt_ids)
        ids[i, :prompt] = torch.tensor(row.prompt_ids)
        ids[i, prompt : len(row)] = torch.from_numpy(row.response_ids)
        attention[i, : len(row)] = 1
        here = slice(prompt - 1, len(row) - 1)
        mask[i, here] = True
        if row.reference is not None:
            reference[i, here] = torch.from_numpy(np.array(row.reference, np.float32))
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "response_mask": mask}
    batch["reference"] = reference
    batch["label"] = torch.tensor([float(item.label) for item in items])
    batch["weight"] = torch.tensor([item.weight for item in items])
    return batch
