"""KVTree: slots are never shared by two tokens, never lost, taken from the least recently used, and all freed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import tiny
from soak import examples

from prm_search.engine.encoder import Encoder
from prm_search.engine.kv_tree import Branch, KVTree
from prm_search.engine.waves import Piece, missing, next_batch


class Ledger(KVTree):
    """A KVTree that checks what it evicts: unpinned leaves, the least recently used first."""

    live: list[Branch]

    def resident(self) -> list[Branch]:
        known: dict[int, Branch] = {}
        for branch in self.live:
            known.update((id(b), b) for b in branch.lineage() if b.encoded)
        return list(known.values())

    def reserve(self, slots: int, needed: Sequence[tuple[Branch, int]] = ()) -> list[Branch]:
        resident = {id(b): b for b in self.resident()}
        pinned = {id(b) for b in resident.values() if b.pins}
        evicted = super().reserve(slots, needed)
        for branch in evicted:
            assert id(branch) not in pinned
            parents = {id(b.parent) for b in resident.values() if b.parent is not None}
            leaves = [b for b in resident.values() if id(b) not in parents and id(b) not in pinned]
            assert any(b is branch for b in leaves)
            ticks = {id(b): max([b.tick, *(e.tick for e in evicted if self.under(e, b))]) for b in leaves}
            assert ticks[id(branch)] == min(ticks.values())
            del resident[id(branch)]
        return evicted

    @staticmethod
    def under(branch: Branch, above: Branch) -> bool:
        return any(b is above for b in branch.lineage() if b is not branch)


class Paper:
    """A model in place of Runner and Head: the hidden row of a token is the number of the path up to it.

    A token's log-probability is the number of the path before it. `written` is what the pools hold, slot -> the path
    up to a token, so that a slot that moved or was written over shows.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, ...], float] = {}
        self.written: dict[int, tuple[int, ...]] = {}
        self.faults: list[str] = []  # of the next forwards: "" (none), "raise" or "nan"
        self.nan = False
        self.vocab = 1 << 40

    def number(self, path: Sequence[int]) -> float:
        return self.numbers.setdefault(tuple(path), float(len(self.numbers)))

    def plan(self, wave: Sequence[Piece], slots: Sequence[np.ndarray]) -> Any:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "raise":
            raise MemoryError("no memory left")
        self.nan = self.nan or fault == "nan"
        order = list(reversed(range(len(wave))))
        rows: list[float] = []
        for i in order:
            path = wave[i].branch.path_ids()
            first = wave[i].branch.start + wave[i].begin
            for at, slot in enumerate(slots[i].tolist(), first + 1):
                self.written[slot] = tuple(path[:at])
                rows.append(self.number(path[:at]))
        for i in order:
            path, end = wave[i].branch.path_ids(), wave[i].branch.start + wave[i].end
            held = wave[i].branch.path_slots()[:end].tolist()
            assert [self.written[slot] for slot in held] == [tuple(path[: at + 1]) for at in range(end)]
        hidden = torch.tensor(rows, dtype=torch.float64)[:, None]
        run = lambda tables: (hidden, [torch.as_tensor(table) for table in tables])  # noqa: E731
        return SimpleNamespace(order=order, run=run)

    def logprobs(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert len(rows) == len(ids)
        return rows[:, 0] * torch.nan if self.nan else rows[:, 0]


@lru_cache(maxsize=1)
def module() -> Any:
    return tiny("llama")


class Trees(RuleBasedStateMachine):
    """Grows, forks, extends and releases branches at random, under an Encoder whose forwards are on Paper.

    Whatever has happened before, a call gives what the same paths would give in a fresh tree.
    """

    @initialize(capacity=st.integers(8, 24), forward_tokens=st.sampled_from([4096, 7, 4]))
    def start(self, capacity: int, forward_tokens: int) -> None:
        self.paper = Paper()
        self.encoder = Encoder(module(), None, "paper", capacity, forward_tokens, "torch")
        self.encoder.tree = self.tree = Ledger(capacity)
        self.encoder.runner = self.encoder.head = self.paper  # type: ignore[assignment]
        self.tree.live = self.live = [self.tree.root([1, 2, 3])]
        self.dead: list[Branch] = []
        self.next = 4

    def new_ids(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))

    @rule(data=st.data())
    def root(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 5) | st.integers(1, self.tree.capacity))
        self.live.append(self.tree.root(self.new_ids(count)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.sampled_from([0, 0, 1, 2, 5]), inside=st.booleans(), encoded=st.booleans())
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
            self.call([(branch, 0)])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), fault=st.sampled_from(["", "", "", "raise", "nan"]), before=st.integers(0, 2))
    def extend(self, data: st.DataObject, fault: str, before: int) -> None:
        """Up to five branches in any order: ends that are shared, nothing new for some, more than fits at once."""
        branches = data.draw(st.lists(st.sampled_from(self.live), min_size=1, max_size=5, unique_by=id))
        job = [(branch, data.draw(st.sampled_from([0, 0, 1, 4]))) for branch in branches]
        if fault:
            self.failing_call(job, ["" for _ in range(before)] + [fault])
        self.call(job)

    def call(self, job: list[tuple[Branch, int]]) -> None:
        job = [(branch, new) for branch, new in job if 0 < branch.length + new <= self.tree.capacity]
        ids = [self.new_ids(new) for _, new in job]
        branches = [branch for branch, _ in job]
        paths = [branch.path_ids() for branch in branches]
        values = self.encoder.extend(branches, ids)
        for branch, path, new, logprobs in zip(branches, paths, ids, values, strict=True):  # type: ignore[arg-type]
            assert branch.path_ids() == path + new
            number = [self.paper.number((path + new)[:at]) if at else np.nan for at in range(len(path + new))]
            np.testing.assert_array_equal(logprobs, number[len(path) :])
            assert branch.end_row().item() == self.paper.number(path + new)

    def failing_call(self, job: list[tuple[Branch, int]], faults: list[str]) -> None:
        """Leaves tokens and rows as they were, and takes no slot; a call of too few forwards to fail is a call."""
        job = [(branch, new) for branch, new in job if 0 < branch.length + new <= self.tree.capacity]
        before = [(branch.path_ids(), branch.row()) for branch in self.live]
        self.paper.faults = faults
        try:
            self.encoder.extend([branch for branch, _ in job], [self.new_ids(new) for _, new in job])
        except (MemoryError, ValueError):
            for branch, (path, row) in zip(self.live, before, strict=True):
                assert branch.path_ids() == path
                assert branch.row() is row
                assert not branch.pins
        self.paper.faults, self.paper.nan = [], False

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        branch = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.tree.release(branch)
        self.tree.release(branch)  # again changes nothing
        self.dead.append(branch)

    @invariant()
    def slots_are_conserved_and_never_shared(self) -> None:
        resident = self.tree.resident()
        held = [slot for branch in resident for slot in branch.slots[: branch.encoded].tolist()]
        assert len(set(held)) == len(held) == self.tree.used
        assert sorted(held + self.tree._free[: self.tree.free].tolist()) == list(range(self.tree.capacity))

    @invariant()
    def what_is_resident_stands_on_what_is_resident(self) -> None:
        for branch in self.tree.resident():
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


Trees.TestCase.settings = settings(max_examples=examples(100), stateful_step_count=40)
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
