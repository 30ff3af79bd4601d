"""Log-probabilities of groups of tokens behind texts, for judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .kv_tree import Branch
from .language_model import LanguageModel

if TYPE_CHECKING:
    from ..tree import SearchTree

TABLE_ELEMENTS = 1 << 26  # of the next-token table of one call: 256 MiB in fp32


@dataclass(frozen=True, eq=False)
class TextEnd:
    """The end of a text.

    Attributes:
        tree: whose meter counts it.
        ids: its tokens.
        near: a branch that may begin as it does; see TextBranches.branch.
    """

    tree: SearchTree
    ids: tuple[int, ...]
    near: Branch | None = None


def next_logprobs(lm: LanguageModel, ends: Sequence[TextEnd], groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities that the next token is one of a group, behind each text.

    Args:
        lm: the model.
        ends: N texts; what is not known of them is encoded in one packed forward.
        groups: G groups of token ids.

    Returns:
        [N, G] nats, on the host, fp32 (fp64 for an fp64 model).
    """
    branches = [lm.texts(end.tree).branch(end.ids, end.near) for end in ends]
    different = list({id(branch): branch for branch in branches}.values())
    rows: dict[int, torch.Tensor] = {}
    most = max(1, TABLE_ELEMENTS // lm.head.vocab)
    for low in range(0, len(different), most):
        part = different[low : low + most]
        table = lm.extend(part, [()] * len(part), want="log_softmax")
        if not isinstance(table, torch.Tensor):
            raise TypeError("extend(want='log_softmax') gives a table")
        sums = [table[:, list(group)].logsumexp(-1) for group in groups]
        rows.update(zip(map(id, part), torch.stack(sums, -1).cpu(), strict=True))
    return torch.stack([rows[id(branch)] for branch in branches])
