"""KVTree alone: slots are never shared by two tokens, never lost, taken from the least recently used, and all freed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prm_search.engine.kv_tree import Branch, KVTree
from prm_search.engine.waves import missing, next_batch


class Trees(RuleBasedStateMachine):
    """Grows, forks, encodes and releases branches at random, as a LanguageModel does, with the tokens written down.

    `written` is what the pools hold: slot -> (the path up to a token, as ids), so that a slot that moved or was
    written over shows.
    """

    @initialize(capacity=st.integers(8, 24))
    def start(self, capacity: int) -> None:
        self.tree = KVTree(capacity)
        self.live: list[Branch] = [self.tree.root([1, 2, 3])]
        self.dead: list[Branch] = []
        self.written: dict[int, tuple[int, ...]] = {}
        self.next = 4

    def new_ids(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))

    @rule(count=st.integers(1, 5))
    def root(self, count: int) -> None:
        self.live.append(self.tree.root(self.new_ids(count)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(0, 5), inside=st.booleans(), encoded=st.booleans())
    def fork(self, data: st.DataObject, count: int, inside: bool, encoded: bool) -> None:
        parent = data.draw(st.sampled_from(self.live))
        edges = st.sampled_from([min(parent.start + i, parent.length) for i in (0, 1, 2)])
        at = data.draw(edges | st.integers(0, parent.length)) if inside else parent.length
        free, used = self.tree.free, self.tree.used
        path = parent.path_ids()[:at]
        branch = self.tree.fork(parent, self.new_ids(count), at=at)
        assert branch.path_ids()[:at] == path
        assert len(branch.path_ids()) == at + count
        assert (self.tree.free, self.tree.used, branch.encoded) == (free, used, 0)  # nothing taken, nothing copied
        self.live.append(branch)
        if encoded:
            self.encode_all([branch])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 4))
    def append(self, data: st.DataObject, count: int) -> None:
        data.draw(st.sampled_from(self.live)).token_ids.extend(self.new_ids(count))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def encode(self, data: st.DataObject) -> None:
        self.encode_all(data.draw(st.lists(st.sampled_from(self.live), min_size=1, max_size=4, unique_by=id)))

    def encode_all(self, wanted: list[Branch]) -> None:
        """What LanguageModel does for one call, without a model."""
        pending = [b for b in wanted if 0 < b.length <= self.tree.capacity and missing(b)]
        while pending:
            batch = next_batch(pending, self.tree.capacity, self.tree.free, 1000)
            pinned = {id(branch) for branch, _ in batch.path}
            for branch in pending[: batch.branches]:
                self.tree.touch(branch)
            for branch, _ in batch.path:
                branch.pins += 1
            before = self.resident()
            evicted = self.tree.reserve(sum(p.end - p.begin for p in batch.pieces), batch.path)
            self.check_eviction(before, evicted, pinned)
            for piece in batch.pieces:
                slots = self.tree.take(piece.branch, piece.end - piece.begin)
                path = piece.branch.path_ids()
                for slot, own in zip(slots.tolist(), range(piece.begin, piece.end), strict=True):
                    self.written[slot] = tuple(path[: piece.branch.start + own + 1])
            for branch, _ in batch.path:
                branch.pins -= 1
            for branch in pending[: batch.branches]:
                path = branch.path_ids()
                slots = branch.path_slots()
                assert [self.written[s] for s in slots.tolist()] == [tuple(path[: i + 1]) for i in range(len(path))]
                branch.hidden, branch.hidden_at = object(), len(branch.token_ids)  # type: ignore[assignment]
            pending = pending[batch.branches :]

    def check_eviction(self, before: list[Branch], evicted: list[Branch], pinned: set[int]) -> None:
        """Only what was unpinned goes, leaves first, and least recently used first among the leaves of that time."""
        resident = {id(b): b for b in before}
        for branch in evicted:
            assert id(branch) not in pinned
            parents = {id(b.parent) for b in resident.values() if b.parent is not None}
            leaves = [b for b in resident.values() if id(b) not in parents and id(b) not in pinned]
            assert any(b is branch for b in leaves)
            ticks = {id(b): max([b.tick, *(e.tick for e in evicted if self.under(e, b))]) for b in leaves}
            assert ticks[id(branch)] == min(ticks.values())
            del resident[id(branch)]

    @staticmethod
    def under(branch: Branch, above: Branch) -> bool:
        return any(b is above for b in branch.lineage() if b is not branch)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        branch = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.tree.release(branch)
        self.tree.release(branch)  # again changes nothing
        self.dead.append(branch)

    def resident(self) -> list[Branch]:
        known: dict[int, Branch] = {}
        for branch in self.live:
            known.update((id(b), b) for b in branch.lineage() if b.encoded)
        return list(known.values())

    @invariant()
    def slots_are_conserved_and_never_shared(self) -> None:
        resident = self.resident()
        held = [slot for branch in resident for slot in branch.slots[: branch.encoded].tolist()]
        assert len(set(held)) == len(held) == self.tree.used
        assert sorted(held + self.tree._free[: self.tree.free].tolist()) == list(range(self.tree.capacity))

    @invariant()
    def what_is_resident_stands_on_what_is_resident(self) -> None:
        for branch in self.resident():
            if branch.start:
                assert branch.parent is not None
                assert branch.parent.start < branch.start <= branch.parent.start + branch.parent.encoded
                assert branch.parent.resident_children > 0

    @invariant()
    def the_released_hold_nothing_once_nobody_stands_on_them(self) -> None:
        for branch in self.dead:
            if branch.children == 0:
                assert not branch.encoded
                assert branch.hidden is None

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            for branch in self.live:
                self.tree.release(branch)
            assert self.tree.free == self.tree.capacity
            assert sorted(self.tree._free.tolist()) == list(range(self.tree.capacity))


Trees.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTrees = Trees.TestCase


def encode(tree: KVTree, branch: Branch) -> np.ndarray:
    for part in missing(branch):
        tree.reserve(part.end - part.begin)
        tree.take(part.branch, part.end - part.begin)
    return branch.path_slots()


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = KVTree(6)
    old, new, used = (tree.root([i, i]) for i in range(3))
    for branch in (old, new, used):
        encode(tree, branch)
        tree.touch(branch)
    tree.touch(old)
    assert tree.reserve(2) == [new]
    assert tree.reserve(4) == [used]


def test_ancestors_outlive_their_leaves() -> None:
    tree = KVTree(6)
    root = tree.root([1, 2, 3])
    leaf = tree.fork(root, [4, 5])
    encode(tree, leaf)
    tree.touch(leaf)
    assert tree.reserve(2) == [leaf]
    assert root.encoded == 3
    assert tree.reserve(6) == [root]


def test_pinned_branches_stay() -> None:
    tree = KVTree(4)
    branch = tree.root([1, 2, 3])
    encode(tree, branch)
    branch.pins += 1
    with pytest.raises(ValueError, match="2 free KV slots are needed, 1 are left"):
        tree.reserve(2)
    with pytest.raises(ValueError, match="unpinned"):
        tree.evict(branch)
    branch.pins -= 1
    assert tree.reserve(2) == [branch]


def test_a_path_that_leaves_a_long_branch_early_takes_the_place_of_its_rest() -> None:
    tree = KVTree(10)
    long = tree.root(range(9))
    encode(tree, long)
    side = tree.fork(long, [20, 21, 22, 23], at=4)
    batch = next_batch([side], 10, 0, 100)
    for branch, _ in batch.path:
        branch.pins += 1
    tree.reserve(sum(p.end - p.begin for p in batch.pieces), batch.path)
    assert (long.encoded, tree.free) == (3, 7)  # token 3 is the fork's own


def test_a_fork_next_to_the_start_of_its_parent_hangs_on_the_lender() -> None:
    """Its one token inside the parent is its own, so it takes nothing from the parent, all from the one above."""
    tree = KVTree(20)
    root = tree.root([1, 2, 3])
    child = tree.fork(root, [4, 5, 6])
    twin = tree.fork(child, [7], at=4)
    assert twin.path_ids() == [1, 2, 3, 4, 7]
    assert twin.parent is root
    assert tree.fork(child, [7], at=1).parent is None


@pytest.mark.parametrize("at", [-1, 4])
def test_a_fork_outside_the_path(at: int) -> None:
    tree = KVTree(5)
    with pytest.raises(ValueError, match=f"at={at}: the path has 3 tokens"):
        tree.fork(tree.root([1, 2, 3]), at=at)


def test_a_released_branch_is_not_forked() -> None:
    tree = KVTree(5)
    root = tree.root([1])
    tree.release(root)
    with pytest.raises(ValueError, match="released"):
        tree.fork(root)


def test_no_capacity() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        KVTree(0)


def test_the_queue_of_candidates_does_not_grow_with_searches_gone_by() -> None:
    tree = KVTree(100)
    for i in range(2000):
        branch = tree.root([i])
        encode(tree, branch)
        tree.release(branch)
    assert len(tree._leaves) < 200
    assert tree.free == 100
