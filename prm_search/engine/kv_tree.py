"""The KV tree: branches over one pool of slots, forked in O(1), evicted least recently used first.

KV is a cache here, never state: a branch knows its tokens, so whatever was evicted can be encoded again. This
module does the book-keeping on the host and knows no model; the tensors the slots index live in `pool.py`.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from ..usage import Meter


class Growing(Protocol):
    """The rows whose newest slots are in no branch yet; `Growth` is it."""

    def store(self) -> None:
        """Put the slots into branches, which may be evicted."""
        ...


class Branch:
    """A run of tokens after `start` tokens of its parent's path. Made by KVTree.root and KVTree.fork.

    Attributes:
        parent, start: the branch this one goes on from, and the path length where it leaves it.
        token_ids: its own tokens, encoded or not.
        encoded: how many of them have their KV in slots now.
        seen: how many were ever encoded; encoding those again is counted as "reencoded".
        slots: [>= encoded] int64 slots of its own tokens.
        hidden: [D] last hidden row of its last token, once that was encoded; kept when the KV is evicted.
        boundary: [D] hidden row of the token before its first, where that was known when the branch was made.
        fork_rows: own tokens after which a fork stands that was made before their hidden row was known -> that row,
            [D], kept for the fork once it has been computed.
        meter: where its tokens are counted.
        epoch: grows when it gives slots back: until then, the slots of its path stay what they are.
    """

    __slots__ = (
        "__weakref__", "_path", "boundary", "children", "encoded", "epoch", "fork_rows", "hidden", "hidden_at",
        "meter", "parent", "pins", "queued", "released", "resident_children", "seen", "slots", "start", "tick",
        "token_ids", "tree",
    )  # fmt: skip

    def __init__(self, tree: KVTree, parent: Branch | None, start: int, meter: Meter | None) -> None:
        self.tree = tree
        self.parent = parent
        self.start = start
        self.meter = meter
        self.token_ids: list[int] = []
        self.encoded = 0
        self.seen = 0
        self.epoch = 0
        self.slots = np.empty(0, np.int64)
        self.hidden: torch.Tensor | None = None
        self.hidden_at = -1  # own tokens up to which `hidden` speaks
        self.boundary: torch.Tensor | None = None
        self.fork_rows: dict[int, torch.Tensor | None] = {}
        self.children = 0
        self.resident_children = 0
        self.pins = 0
        self.tick = 0
        self.released = False
        self.queued = False  # stands in the tree's queue of eviction candidates
        self._path: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens from the start of the prompt to this branch's end, encoded or not."""
        return self.start + len(self.token_ids)

    def lineage(self) -> Iterator[Branch]:
        """This branch and its ancestors, from the tip down."""
        branch: Branch | None = self
        while branch is not None:
            yield branch
            branch = branch.parent

    def path_ids(self) -> list[int]:
        """Token ids from the start of the prompt to this branch's end."""
        parts, stop = [], self.length
        for branch in self.lineage():
            parts.append(branch.token_ids[: stop - branch.start])
            stop = branch.start
        return [i for part in reversed(parts) for i in part]

    def path_slots(self) -> np.ndarray:
        """[start + encoded] int64 slots of the path, which must be resident. A view: do not write."""
        have, want = (0 if self._path is None else len(self._path)), self.start + self.encoded
        if self._path is None or have < want or not self.encoded:  # who holds nothing keeps no ancestor in place
            room = np.empty(max(want, want + min(want, 256)), np.int64)
            if self.parent is not None and self.start:
                room[: self.start] = self.parent.path_slots()[: self.start]
            room[self.start : want] = self.slots[: self.encoded]
            self._path = room
        return self._path[:want]

    def row(self) -> torch.Tensor | None:
        """[D] hidden row of the last token of the path, or None where it has not been computed yet."""
        if self.token_ids:
            return self.hidden if self.hidden_at == len(self.token_ids) else None
        return self.before()

    def end_row(self) -> torch.Tensor:
        """`row` of a branch whose path is encoded. Raises RuntimeError for any other."""
        row = self.row()
        if row is None:
            raise RuntimeError(f"no hidden row is known at the end of {self!r}")
        return row

    def before(self) -> torch.Tensor | None:
        """[D] hidden row of the token before this branch's first, or None where it has not been computed yet."""
        if self.boundary is not None or self.parent is None:
            return self.boundary
        return self.parent.row_after(self.start - self.parent.start)

    def row_after(self, own: int) -> torch.Tensor | None:
        """[D] hidden row after this many of its own tokens, or None where it is not kept or not computed yet."""
        return self.hidden if self.hidden_at == own else self.fork_rows.get(own)

    def __repr__(self) -> str:
        return f"<Branch start={self.start} tokens={len(self.token_ids)} encoded={self.encoded}>"


class KVTree:
    """Slots 0 .. capacity-1 and the branches that hold them.

    Args:
        capacity: slots, that is tokens whose KV is held at once.

    Attributes:
        lock: held while slots change hands; whoever calls reserve, take, give_back or evict holds it.
        growing: rows whose newest slots are in no branch yet.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least one token is needed")
        self.capacity = capacity
        self.lock = threading.RLock()
        self.growing: set[Growing] = set()
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int64)  # a stack, lowest slot on top
        self.free = capacity
        self._clock = 0
        self._leaves: list[tuple[int, int, Branch]] = []  # heap of (tick, serial, branch), stale entries included
        self._serial = 0
        self._resident = 0  # branches that hold slots

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.capacity - self.free

    def root(self, token_ids: Sequence[int] = (), meter: Meter | None = None) -> Branch:
        """A branch without a parent, holding these tokens unencoded."""
        branch = Branch(self, None, 0, meter)
        branch.token_ids = [int(i) for i in token_ids]
        return branch

    def fork(
        self, parent: Branch, token_ids: Sequence[int] = (), at: int | None = None, *, scored: bool = True
    ) -> Branch:
        """A new branch after the first `at` tokens of parent's path (default: all). Copies no KV.

        Where the hidden row at `at` is not kept (inside a branch), the last shared token becomes the fork's own
        and is encoded once more, so that the token after it can be scored. `scored=False` spares that for a fork whose
        first token's log-probability nobody wants.

        Raises:
            ValueError: at lies outside parent's path, or parent was released.
        """
        if parent.released:
            raise ValueError("a released branch cannot be forked")
        at = parent.length if at is None else at
        if not 0 <= at <= parent.length:
            raise ValueError(f"at={at}: the path has {parent.length} tokens")
        while at <= parent.start and parent.parent is not None:
            if at == parent.start and not parent.token_ids and parent.boundary is not None:
                break
            parent = parent.parent
        inside = scored and 0 < at < parent.length
        start = at - 1 if inside else at
        above = parent if start > parent.start else parent.parent  # one that lends slots: ancestors stay while it does
        branch = Branch(self, above if start else None, start, parent.meter)
        if inside:
            branch.token_ids = [parent.token_ids[start - parent.start]]
            branch.seen = 1
        elif start and scored:
            branch.boundary = parent.row()
            if branch.boundary is None and branch.parent is not None:  # the parent may grow before it is encoded
                branch.parent.fork_rows.setdefault(start - branch.parent.start, None)
        branch.token_ids += [int(i) for i in token_ids]
        if branch.parent is not None:
            branch.parent.children += 1
        return branch

    def touch(self, branch: Branch) -> None:
        """Mark a branch as just used."""
        self._clock += 1
        branch.tick = self._clock

    def reserve(self, slots: int, needed: Sequence[tuple[Branch, int]] = ()) -> list[Branch]:
        """Evict least recently used unpinned leaves until this many slots are free.

        Args:
            slots: how many.
            needed: pinned branches, each with how many of its own tokens must stay. What lies behind those gives way
                when no leaf is left: a path that leaves a long branch early must fit without the rest of it.

        Returns:
            the branches that were evicted.

        Raises:
            ValueError: everything else is pinned.
        """
        evicted: list[Branch] = []
        self._evict_until(slots, evicted)
        if self.free < slots and self.growing:
            for growth in list(self.growing):
                growth.store()
            self._evict_until(slots, evicted)
        for branch, own in needed:
            if self.free < slots and branch.encoded > own:
                self.give_back(branch, branch.encoded - own)
        if self.free < slots:
            raise ValueError(f"{slots} free KV slots are needed, {self.free} are left and the rest is in use")
        return evicted

    def make_room(self, slots: int) -> bool:
        """Evict as `reserve` does, but nothing that grows; return True if so many slots are free."""
        self._evict_until(slots, [])
        return self.free >= slots

    def _evict_until(self, slots: int, evicted: list[Branch]) -> None:
        while self.free < slots:
            branch = self._pop_leaf()
            if branch is None:
                return
            self.evict(branch)
            evicted.append(branch)

    def grab(self, slots: int) -> np.ndarray:
        """Take free slots for tokens that are in no branch yet, [slots] int64; see `adopt` and `put_back`."""
        self.free -= slots
        return self._free[self.free : self.free + slots][::-1].copy()

    def put_back(self, slots: np.ndarray) -> None:
        """Free slots that were grabbed."""
        self._free[self.free : self.free + len(slots)] = slots[::-1]
        self.free += len(slots)

    def adopt(self, branch: Branch, slots: np.ndarray) -> None:
        """Make grabbed slots those of a branch's next tokens, which are encoded in them."""
        self._hand(branch, slots)
        branch.seen = max(branch.seen, branch.encoded)
        self.touch(branch)

    def take(self, branch: Branch, tokens: int) -> np.ndarray:
        """Give the branch slots for its next `tokens` tokens; they count as encoded from now on.

        Returns:
            [tokens] int64 slots. The caller has reserved them and writes their KV.
        """
        if tokens > self.free:
            raise ValueError(f"{tokens} slots asked for, {self.free} free: reserve them first")
        slots = self.grab(tokens)
        self._hand(branch, slots)
        return slots

    def _hand(self, branch: Branch, slots: np.ndarray) -> None:
        tokens = len(slots)
        if branch.encoded == 0 and tokens:
            branch._path = None
            self._resident += 1
            if branch.parent is not None:
                branch.parent.resident_children += 1
        if branch._path is not None and branch.start + branch.encoded + tokens <= len(branch._path):
            branch._path[branch.start + branch.encoded : branch.start + branch.encoded + tokens] = slots
        else:
            branch._path = None
        stop = branch.encoded + tokens
        if stop > len(branch.slots):
            grown = np.empty(max(stop, 2 * len(branch.slots)), np.int64)
            grown[: branch.encoded] = branch.slots[: branch.encoded]
            branch.slots = grown
        branch.slots[branch.encoded : stop] = slots
        branch.encoded = stop
        self.offer(branch)

    def give_back(self, branch: Branch, tokens: int) -> None:
        """Free the slots of the branch's last `tokens` encoded tokens, on which nothing resident may stand."""
        kept = branch.encoded - tokens
        self._free[self.free : self.free + tokens] = branch.slots[kept : branch.encoded][::-1]
        self.free += tokens
        branch.encoded = kept
        branch.epoch += 1
        if kept == 0:
            branch._path = None  # its ancestors may move to other slots from now on
        if tokens and kept == 0:
            self._resident -= 1
            if branch.parent is not None:
                branch.parent.resident_children -= 1
                self.offer(branch.parent)

    def evict(self, branch: Branch) -> None:
        """Take the branch's slots back; its tokens and hidden rows stay."""
        if branch.resident_children or branch.pins:
            raise ValueError("only an unpinned branch without resident children can be evicted")
        if branch.parent is not None:
            branch.parent.tick = max(branch.parent.tick, branch.tick)
        self.give_back(branch, branch.encoded)
        branch.slots = np.empty(0, np.int64)

    def release(self, branch: Branch) -> None:
        """The owner is done with the branch: free it, and with it every released ancestor nothing hangs on."""
        with self.lock:
            if branch.released:
                return
            branch.released = True
            tip: Branch | None = branch
            while tip is not None and tip.released and tip.children == 0:
                tip.pins = 0
                self.evict(tip)
                tip.hidden = tip.boundary = None
                tip.fork_rows.clear()
                parent = tip.parent
                if parent is not None:
                    parent.children -= 1
                tip = parent

    def offer(self, branch: Branch) -> None:
        """Queue a branch for eviction, should it be a leaf."""
        if branch.queued or not branch.encoded or branch.resident_children:
            return
        if len(self._leaves) > 64 + 2 * self._resident:  # branches released long ago: let go of them
            for _, _, stale in self._leaves:
                stale.queued = stale.encoded > 0
            self._leaves = [entry for entry in self._leaves if entry[2].queued]
            heapq.heapify(self._leaves)
        self._serial += 1
        branch.queued = True
        heapq.heappush(self._leaves, (branch.tick, self._serial, branch))

    def _pop_leaf(self) -> Branch | None:
        """The least recently used branch that may be evicted. Entries of the heap may be out of date."""
        pinned: list[Branch] = []
        oldest = None
        while self._leaves and oldest is None:
            tick, _, branch = heapq.heappop(self._leaves)
            branch.queued = False
            if branch.pins:
                pinned.append(branch)
            elif tick != branch.tick:  # used since it was queued: try again at its present age
                self.offer(branch)
            elif branch.encoded and not branch.resident_children:
                oldest = branch
        for branch in pinned:
            self.offer(branch)
        return oldest
