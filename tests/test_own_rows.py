"""Mirrors of what rows have of their own: the pool's numbers, whatever came and went; none where there is no room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import PROMPT, check, decoded, policy_of
from models import tiny

import prm_search as ps
from prm_search.engine.attention import row_layout
from prm_search.engine.attention.own_rows import Mirror, OwnRows, Room
from prm_search.sampling import Request, Sampling
from prm_search.tree import Prompt, SearchTree


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every reading is compared with a gathering of the slots. Gives the rows of each."""
    read = OwnRows.read
    rows: list[int] = []

    def both(group: OwnRows, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Any:
        pair = read(group, layer, keys, values)
        for mine, pool in zip(pair, (keys, values), strict=True):
            theirs = group._gathered(pool)
            assert mine.shape == theirs.shape
            for line, own in enumerate(group.own):
                assert torch.equal(mine[line, :, :own], theirs[line, :, :own])
            assert mine.isfinite().all()
        rows.append(len(group.own))
        return pair

    monkeypatch.setattr(OwnRows, "read", both)
    return rows


@pytest.mark.parametrize("ahead", [False, True])
def test_a_mirror_is_the_pool(ahead: bool, compared: list[int]) -> None:
    """While rows end, begin behind other nodes, lose their slots and come back; paths longer than a mirror is wide."""
    policy = policy_of(4096)
    policy._decoder.ahead = ahead
    tree = policy.lm.tree

    def stored(turn: int) -> None:
        with tree.lock:
            if turn % 9 == 7:
                tree.reserve(tree.capacity)

    decoded(policy, stored, tokens=70)
    assert len(set(compared)) > 3


def test_without_room_the_slots_are_gathered_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = decoded(policy_of(4096))
    made: list[int] = []
    monkeypatch.setattr(Mirror, "__init__", lambda self, *_: made.append(1))
    monkeypatch.setattr(row_layout, "Room", lambda left: Room(0))
    check(plain, decoded(policy_of(4096))[0])
    assert not made


def test_mirrors_take_no_more_than_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[tuple[Room, int]] = []

    def watched(left: int) -> Room:
        rooms.append((Room(left), left))
        return rooms[-1][0]

    monkeypatch.setattr(row_layout, "Room", watched)
    policy = policy_of(150)
    decoded(policy, lambda _: [None for room, left in rooms if not 0 <= room.left <= left and pytest.fail("overdrawn")])
    assert {left for _, left in rooms} == {policy.lm.pool.bytes() // 2}
    assert any(0 < room.left < left for room, left in rooms)


def test_a_token_is_copied_once_while_the_same_rows_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading gathers a row's own; each one after it takes one token a row."""
    policy = policy_of(4096, stop_ids=[])
    lacking: list[int] = []
    lack = OwnRows._lack

    def counted(group: OwnRows, have: Any) -> Any:
        tables = lack(group, have)
        lacking.append(len(tables[0]))
        return tables

    monkeypatch.setattr(OwnRows, "_lack", counted)
    tree = SearchTree(Prompt(token_ids=PROMPT))
    sampling = Sampling(ps.StepRule(None, max_tokens=None), max_new_tokens=12)
    policy.submit([Request.draw(tree.root, 4, sampling, until="end", merge=False)])
    while not policy.advance():
        pass
    policy.release(tree)
    layers = len(tiny().model.layers)
    assert lacking[:layers] == [4 * (len(PROMPT) + 1)] * layers
    assert set(lacking[layers:]) == {4}


def test_rows_that_stay_are_taken_over_when_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of theirs is gathered again."""
    lacking: list[int] = []
    lack = OwnRows._lack

    def counted(group: OwnRows, have: Any) -> Any:
        tables = lack(group, have)
        lacking.append(len(tables[0]) - len(group.own))
        return tables

    monkeypatch.setattr(OwnRows, "_lack", counted)
    policy = policy_of(4096, stop_ids=[])
    tree = SearchTree(Prompt(token_ids=PROMPT))
    for tokens in (5, 9, 20):  # they end one after the other
        sampling = Sampling(ps.StepRule(None, max_tokens=None), max_new_tokens=tokens)
        policy.submit([Request.draw(tree.root, 2, sampling, until="end", merge=False)])
    ended = 0
    while ended < 3:
        ended += len(policy.advance())
    policy.release(tree)
    layers = len(tiny().model.layers)
    assert lacking[:layers] == [6 * len(PROMPT)] * layers
    assert not any(lacking[layers:])
