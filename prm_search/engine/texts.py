"""Texts that a model is asked about beside the nodes of a search: what they begin with in common is encoded once."""

from __future__ import annotations

from collections.abc import Hashable

from ..usage import Meter
from .kv_tree import Branch, KVTree
from .prefixes import Prefixes, common


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
