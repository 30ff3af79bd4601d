"""Growth: branches of one model that grow by a token each in every round, together, as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .kv_tree import Branch, KVTree
from .waves import Piece, whole

if TYPE_CHECKING:
    import torch

    from ..usage import Meter


class GrownPath:
    """A row of a growth as a branch of one more token, for forwards that are planned from branches.

    Attributes: as Branch's, as far as such a plan reads them.
    """

    __slots__ = ("__weakref__", "_growth", "encoded", "epoch", "parent", "place", "start")

    def __init__(self, growth: Growth, parent: Branch) -> None:
        self._growth, self.parent, self.start, self.epoch = growth, parent, parent.length, 0
        self.encoded = self.place = 0

    def path_slots(self) -> np.ndarray:
        """As Branch.path_slots."""
        return self._growth.paths[self.place, : self.start + self.encoded]


class GrownPiece(Piece):
    """A row's newest token."""

    newest: int = -1

    def ids(self) -> list[int]:
        """As Piece.ids."""
        return [self.newest]


class Growth:
    """Rows that begin behind branches and grow.

    While it is live, the slots of a row's tokens stand here and nothing is done for one row. When somebody else needs
    the slots (`KVTree.reserve`) all of it is `store`d: branches are made of the rows, which may be evicted and are
    encoded again as any branch is. When all of them are resident again it comes back to life. So what the rows draw
    never depends on it. Every method is called with the tree's lock held.

    Args:
        tree: of the model.

    Attributes:
        live: whether the rows' newest slots are here.
        tips: the branch that each row is in: of the step under way. Behind the truth while the growth is live.
        count: [R] tokens that each row has encoded since its node.
        length: [R] tokens of its path; only while live, as are the paths.
        paths: [R, P] slots of its path.
        rows: each row as a branch, the same object as long as it grows.
        stems, shared: rows with equal stems begin with the same `shared` slots, [R].
        version: another number whenever rows have come or gone.
        unnamed: the newest tokens are on the device, and the host does not know them.
    """

    def __init__(self, tree: KVTree) -> None:
        self.tree = tree
        self.live = True
        self.tips: list[Branch] = []
        self.rows: list[GrownPath] = []
        self.stems: list[int] = []
        self.version = 0
        self.plan: Any = None  # of attention, whoever makes it; for one version
        self._nodes: list[Branch] = []
        self._done: list[list[Branch]] = []
        self._ends: list[list[tuple[int, torch.Tensor | None]]] = []  # where steps end, and the hidden row there
        self._hidden: torch.Tensor | None = None  # of the newest tokens
        self._held: list[Branch | None] = []  # parent of an empty tip; None where the tip itself is pinned
        none = np.zeros(0, np.int64)
        self.count, self.length, self.shared = none, none, none
        self._stored, self._base, self._due, self._at = none, none, none, none
        self._tokens = np.zeros((0, 16), np.int64)
        self.paths = np.zeros((0, 0), np.int64)
        self._meters: tuple[int, list[tuple[Meter, int]]] = (-1, [])
        self._earlier: dict[int, torch.Tensor | None] = {}  # of rows whose newest token was wasted: the row before it
        self.unnamed = False
        self._undo: tuple[torch.Tensor | None, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.tips)

    # --- rows come and go ------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[Branch]) -> None:
        """Begin a row behind each of these branches, whose paths are encoded."""
        if not nodes:
            return
        self.tree.growing.add(self)
        first, count = len(self.tips), len(nodes)
        for node in nodes:
            self.tips.append(self.tree.fork(node))
            self.stems.append(id(node))
        self._nodes += nodes
        self._done += [[] for _ in nodes]
        self._ends += [[] for _ in nodes]
        self._held += [None] * count
        self.rows += [GrownPath(self, node) for node in nodes]
        zeros = np.zeros(count, np.int64)
        self.shared = np.concatenate([self.shared, [node.length for node in nodes]])
        for name in ("count", "length", "_stored", "_base"):
            setattr(self, name, np.concatenate([getattr(self, name), zeros]))
        for name in ("_due", "_at"):
            setattr(self, name, np.concatenate([getattr(self, name), zeros - 1]))
        self._tokens = np.concatenate([self._tokens, np.zeros((count, self._tokens.shape[1]), np.int64)])
        self.paths = np.concatenate([self.paths, np.zeros((count, self.paths.shape[1]), np.int64)])
        self.version += 1
        if self._undo is not None:
            hidden, before, due = self._undo
            self._undo = hidden, np.concatenate([before, zeros - 1]), np.concatenate([due, zeros - 1])
        if self.live:
            if all(whole(tip) for tip in self.tips[first:]):
                self._load(range(first, first + count))
            else:
                self.store(first)

    def remove(self, places: Sequence[int]) -> list[list[Branch]]:
        """Take rows out. Returns the branches of each one's steps, the last of them perhaps empty or behind a token."""
        for place in places:
            self._store(place)
            self._let_go(place)
        gone = set(places)
        branches = [[*self._done[place], self.tips[place]] for place in places]
        kept = [place for place in range(len(self.tips)) if place not in gone]
        for name in ("tips", "stems", "_nodes", "_done", "_ends", "_held", "rows"):
            old = getattr(self, name)
            setattr(self, name, [old[place] for place in kept])
        for name in ("count", "length", "shared", "_stored", "_base", "_due", "_at", "_tokens", "paths"):
            setattr(self, name, getattr(self, name)[kept])
        self._earlier.clear()
        if self._undo is not None:
            hidden, before, due = self._undo
            self._undo = hidden, before[kept], due[kept]
        if not kept:
            self._hidden, self.live, self._undo, self.unnamed, self.plan = None, True, None, False, None
            self.tree.growing.discard(self)
        self.version += 1
        return branches

    def cut(self, place: int, at: int) -> None:
        """End a row's step after `at` tokens since its node: all that are encoded, or those and the newest."""
        if self.count[place] == at:
            self._ends[place].append((at, self._row(place)))
        else:
            self._ends[place].append((at, None))
            self._due[place] = at

    # --- a token each ----------------------------------------------------------------------------------------------

    def reach(self) -> int:
        """Return the tokens of the longest path with one more token."""
        return int((self.count + self.shared).max()) + 1

    def revive(self) -> bool:
        """Come back to life if all rows are resident; return True if it is live."""
        if not self.live:
            for place, ends in enumerate(self._ends):
                if ends:
                    self._store(place)
            if all(whole(tip) for tip in self.tips):
                self.live = True
                self._load(range(len(self.tips)))
                self.version += 1
        return self.live

    def begin(self, tokens: np.ndarray | None) -> np.ndarray:
        """Take a slot for each row's newest token. Returns them, [R] int64; so many have to be free.

        Args:
            tokens: [R] int64; None where the host does not know them yet: `name` follows before the lock is let go.
        """
        rows, lines = len(self.tips), np.arange(len(self.tips))
        slots = self.tree.grab(rows)
        if int(self.length.max()) >= self.paths.shape[1]:
            wider = np.zeros((rows, max(64, 2 * self.paths.shape[1], int(self.length.max()) + 1)), np.int64)
            wider[:, : self.paths.shape[1]] = self.paths
            self.paths = wider
        self.paths[lines, self.length] = slots
        self._widen()
        self.unnamed = tokens is None
        if tokens is not None:
            self._tokens[lines, self.count] = tokens
        self.count += 1
        self._undo = self._hidden, self._at, self._due
        self.length += 1
        return slots

    def name(self, tokens: np.ndarray) -> None:
        """Tell the newest tokens, [R], of a round that was begun without."""
        if self.unnamed:
            self._tokens[np.arange(len(self.tips)), self.count - 1] = tokens
            self.unnamed = False

    def waste(self, places: Sequence[int]) -> None:
        """Take the newest token back from rows, as if their last round had not been; of what `begin` began."""
        if not places or self._undo is None or not self.live:
            return
        at = np.array(places)
        hidden, before, _ = self._undo
        for place in places:
            row = hidden[int(before[place])] if hidden is not None and before[place] >= 0 else None
            self._earlier[place] = row if row is not None else self.tips[place].row()
        self.count[at] -= 1
        self.length[at] -= 1
        self.tree.put_back(self.paths[at, self.length[at]])

    def pieces(self) -> list[Piece]:
        """Return the newest tokens as pieces of branches, after `begin`."""
        pieces: list[Piece] = []
        newest = self._tokens[np.arange(len(self.tips)), self.count - 1].tolist()
        for place, (path, token) in enumerate(zip(self.rows, newest, strict=True)):
            path.place, path.encoded = place, int(self.length[place]) - path.start
            piece = GrownPiece(path, path.encoded - 1, path.encoded)  # type: ignore[arg-type]
            piece.newest = token
            pieces.append(piece)
        return pieces

    def grown(self, hidden: torch.Tensor) -> None:
        """Take the hidden rows [R, D] of the newest tokens."""
        self._hidden, self._at = hidden, np.arange(len(self.tips))
        due = np.flatnonzero(self._due == self.count)
        if len(due):
            self._due = self._due.copy()
            for place in due.tolist():
                self._ends[place][-1] = (self._ends[place][-1][0], hidden[place])
                self._due[place] = -1

    def passed(self, tokens: np.ndarray) -> None:
        """Note that the newest tokens were encoded as any branches' are."""
        self._widen()
        self._tokens[np.arange(len(self.tips)), self.count] = tokens
        self.count += 1
        self._stored = self.count.copy()
        self._undo = None

    def take_back(self) -> None:
        """Undo the newest round of `begin`, or of `passed`."""
        if self._undo is None:
            self.count -= 1
            self._stored = self.count.copy()
        elif self.live:
            hidden, self._at, due = self._undo
            for place in np.flatnonzero(self._due != due).tolist():
                self._ends[place][-1] = (self._ends[place][-1][0], None)
            self._hidden, self._due = hidden, due
            self.count -= 1
            self.length -= 1
            self.tree.put_back(self.paths[np.arange(len(self.tips)), self.length])

    def meters(self) -> list[tuple[Meter, int]]:
        """Return the meters of the rows, each with how many of them it counts."""
        if self._meters[0] != self.version:
            counted = Counter(id(tip.meter) for tip in self.tips if tip.meter is not None)
            known = {id(tip.meter): tip.meter for tip in self.tips}
            self._meters = self.version, [(known[key], n) for key, n in counted.items()]  # type: ignore[misc]
        return self._meters[1]

    def _widen(self) -> None:
        if len(self.count) and int(self.count.max()) >= self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)

    # --- branches of rows ------------------------------------------------------------------------------------------

    def store(self, upto: int | None = None) -> None:
        """Make branches of all rows, which are then like any others; of the first `upto` that were live."""
        if self.live:
            for place in range(len(self.tips) if upto is None else upto):
                self._store(place)
                self._let_go(place)
            for path in self.rows:
                path.epoch += 1
            self.live = False
            self._hidden = self.plan = None
            self._earlier.clear()
            self._at = np.full_like(self._at, -1)
            self.version += 1

    def _store(self, place: int) -> None:
        """Bring a row's branches up to what it has encoded, step by step."""
        ends, count, position = self._ends[place], int(self.count[place]), int(self._stored[place])
        base = int(self._base[place])
        while True:
            tip = self.tips[place]
            stop = min(ends[0][0], count) if ends else count
            if stop > position:
                if tip.encoded == 0:
                    self._let_go(place)
                tip.token_ids += self._tokens[place, position:stop].tolist()
                self.tree.adopt(tip, self.paths[place, base + position : base + stop])
                if stop == count:
                    self._keep_row(tip, self._row(place))
                position = stop
            if not ends or ends[0][0] > count:
                break
            if ends[0][1] is not None and tip.token_ids:
                self._keep_row(tip, ends[0][1])
            del ends[0]
            self._done[place].append(tip)
            self._let_go(place)
            self.tips[place] = self.tree.fork(tip)
        self._stored[place] = position

    @staticmethod
    def _keep_row(branch: Branch, row: torch.Tensor | None) -> None:
        if row is not None:
            branch.hidden, branch.hidden_at = row, len(branch.token_ids)

    def _row(self, place: int) -> torch.Tensor | None:
        """The hidden row of the newest token that a row has encoded."""
        if place in self._earlier:
            return self._earlier[place]
        at = int(self._at[place])
        return self._hidden[at] if at >= 0 and self._hidden is not None else self.tips[place].row()

    def _load(self, places: Sequence[int]) -> None:
        """Take the paths of rows whose branches are resident, and hold these in place."""
        longest = max((self.tips[place].length for place in places), default=0)
        if longest > self.paths.shape[1]:
            wider = np.zeros((len(self.tips), max(64, 2 * longest)), np.int64)
            wider[:, : self.paths.shape[1]] = self.paths
            self.paths = wider
        slots: dict[int, np.ndarray] = {}
        for place in places:
            tip = self.tips[place]
            if tip.encoded:
                path = tip.path_slots()
                tip.pins += 1
            else:
                parent = tip.parent
                assert parent is not None  # nodes have tokens
                if id(parent) not in slots:
                    slots[id(parent)] = parent.path_slots()
                path = slots[id(parent)][: tip.start]
                parent.resident_children += 1
                self._held[place] = parent
            self.paths[place, : len(path)] = path
            self.length[place] = len(path)
            self._base[place] = len(path) - int(self.count[place])

    def _let_go(self, place: int) -> None:
        """Undo what `_load` did to hold a row's path."""
        parent, self._held[place] = self._held[place], None
        if parent is not None:
            parent.resident_children -= 1
            self.tree.offer(parent)
        elif self.live and self.tips[place].pins:
            self.tips[place].pins -= 1
