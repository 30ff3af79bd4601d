"""The host arithmetic behind the launches: splits cover the work once, and prefixes are shared only where it pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from prm_search.triton_kernels import tiles

TILES = [tiles.HOPPER_FEW, tiles.HOPPER_PLAIN, tiles.POINTER_FEW, tiles.FULL]


@given(st.integers(1, 40_000), st.integers(1, 300_000), st.sampled_from(TILES), st.integers(1, 264))
def test_vocabulary_splits_are_never_empty(rows, vocabulary, tile, slots):
    splits, count = tiles.matmul_splits(rows, vocabulary, tile, slots), -(-vocabulary // tile.v)
    bounds = [split * count // splits for split in range(splits + 1)]  # as the kernel divides
    assert bounds[0] == 0
    assert bounds[-1] == count
    assert all(a < b for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("rows", [1, 17, 64, 512, 1024, 2048])
def test_the_head_of_a_large_vocabulary_fills_the_device(rows):
    tile = tiles.matmul_tile(capability=(9, 0), rows=rows, half=True, tma=True, plain=True)
    slots = 132 * tile.resident
    programs = tiles.matmul_splits(rows, 151_936, tile, slots) * -(-rows // tile.m)
    waves = programs / slots
    assert waves / -(-programs // slots) >= 0.9  # the share of the last wave that has work


@given(st.integers(1, 600), st.integers(1, 300_000), st.integers(1, 264))
def test_row_splits_cover_the_row(rows, width, slots):
    splits, share = tiles.row_splits(rows, width, slots, 1024)
    assert (splits - 1) * share < width <= splits * share
    assert 1 <= splits <= tiles.power_of_two(splits) <= 64


SCHEDULE = {"capability": (9, 0), "slots": 132, "half": True, "kv_heads": 4, "group": 7, "head_dim": 128}


def test_long_decodes_are_split_and_wide_batches_are_not():
    few = tiles.attention_schedule(**SCHEDULE, rows=2, max_new=1, max_path=16_384)
    many = tiles.attention_schedule(**SCHEDULE, rows=256, max_new=1, max_path=16_384)
    assert few.splits > 8
    assert many.splits == 1
    short = tiles.attention_schedule(**SCHEDULE, rows=1, max_new=1, max_path=100)
    assert short.splits == 1  # nothing to split


@pytest.mark.parametrize(
    ("change", "pays"),
    [
        ({}, True),
        ({"max_new": 64}, False),  # above the ridge each row's own pass is bound by arithmetic, not by reading
        ({"max_prefix": 100}, False),  # too short for a second pass and a merge
        ({"groups": 16}, False),  # no row shares
        ({"groups": 0}, False),
    ],
)
def test_a_prefix_is_read_once_where_it_pays(change, pays):
    case = {"max_new": 1, "group": 7, "rows": 16, "groups": 1, "max_prefix": 4096, **change}
    assert tiles.prefix_pays(**case) is pays


def test_a_shared_prefix_gets_its_own_pass():
    schedule = tiles.attention_schedule(
        **SCHEDULE, rows=64, max_new=1, max_path=5000, groups=1, max_group_tokens=64, max_prefix=4096
    )
    assert schedule.prefix_splits >= 1
    assert schedule.prefix_query_tiles * schedule.prefix_tile.m >= 64 * 7


def test_one_familys_long_prefix_is_split_though_many_families_have_room():
    """A captured step tells the most families there may be: 64 rows behind one prompt of 4,096 tokens fill a device."""
    case = {**SCHEDULE, "rows": 64, "max_new": 1, "max_path": 8192, "max_group_tokens": 64, "max_prefix": 4096}
    for groups in (1, 32):
        schedule = tiles.attention_schedule(**case, groups=groups)
        programs = schedule.prefix_query_tiles * schedule.prefix_splits * SCHEDULE["kv_heads"]  # that have work
        assert programs >= 0.9 * SCHEDULE["slots"]
        assert schedule.prefix_splits >= 4096 // tiles.PREFIX_SHARE


@given(st.integers(1, 64), st.integers(1, 64), st.integers(512, 131_072))
def test_prefix_splits_stay_within_what_a_merge_can_take(rows, groups, prefix):
    schedule = tiles.attention_schedule(
        **SCHEDULE, rows=max(rows, groups + 1), max_new=1, max_path=2 * prefix, groups=groups, max_group_tokens=rows,
        max_prefix=prefix,
    )  # fmt: skip
    assert 1 <= schedule.prefix_splits <= tiles.MOST_SPLITS
    share = -(-prefix // schedule.prefix_splits)
    assert share <= tiles.PREFIX_SHARE + schedule.prefix_tile.n or schedule.prefix_splits == tiles.MOST_SPLITS


def test_head_dimensions_are_padded_to_what_a_product_takes():
    assert [tiles.padded(dim) for dim in (1, 16, 24, 64, 80, 192, 256)] == [16, 16, 32, 64, 128, 256, 256]
