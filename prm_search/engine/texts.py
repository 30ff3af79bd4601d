"""Texts that a model is asked about beside the nodes of a search: what they begin with in common is encoded once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..prefixes import Prefixes, common
from ..usage import Meter
from .kv_tree import Branch, KVTree

if TYPE_CHECKING:
    from ..tree import SearchTree
    from .language_model import LanguageModel

TABLE_ELEMENTS = 1 << 26  # of the next-token table of one call: 256 MiB in fp32


class TextBranches:
    """The texts asked about for one search tree, as branches. Made by LanguageModel.texts, freed by its release.

    Args:
        kv: where the branches are made.
        meter: where their tokens are counted.
        model: the model's id.
    """

    def __init__(self, kv: KVTree, meter: Meter, model: Hashable) -> None:
        self._kv, self._meter, self._model = kv, meter, model
        self._known: Prefixes[Branch] = Prefixes()

    def branch(self, ids: tuple[int, ...], near: Branch | None = None) -> Branch:
        """The branch of a text: one that is known, or a fork where it leaves the one it shares most with.

        Args:
            ids: at least one token.
            near: a branch of the same KV, beside those known here, that may begin as the text does.
        """
        branch = self._known.get(ids)
        if branch is None:
            shared, above = self._known.nearest(ids)
            if near is not None and (own := common(ids, near.path_ids())) > shared:
                shared, above = own, near
            repeated = shared == len(ids)  # a beginning of a known text: its last row is not kept
            shared -= repeated
            if above is None or not shared:
                branch = self._kv.root(ids, self._meter)
            else:
                branch = self._kv.fork(above, ids[shared:], at=shared, scored=False)
                branch.meter = self._meter
                self._meter.add("cached", self._model, shared if above.encoded else 0)
            branch.seen = int(repeated)
            self._known.add(ids, branch)
        return branch

    def free(self) -> None:
        """Release every branch."""
        for branch in self._known.values():
            self._kv.release(branch)
        self._known = Prefixes()


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
