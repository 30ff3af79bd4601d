"""Counter-based draws: known answers, ranges, independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from prm_search.rng import child_lineage, philox, stream, uniforms

WORD = st.integers(0, 2**64 - 1)
POSITION = st.integers(0, 2**31)


# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    found = philox(np.array([counter], np.uint32), np.array([key], np.uint32))
    assert found.dtype == np.uint32
    assert found.tolist() == [expected]


def test_uniforms_use_the_first_53_bits_of_the_block() -> None:
    (u,) = uniforms([5], [6], [7], [8])
    assert u == np.floor(u * 2**53) / 2**53
    assert 0 <= u < 1


@given(st.lists(st.tuples(WORD, WORD, WORD, POSITION), min_size=1, max_size=20), st.randoms())
def test_a_draw_does_not_depend_on_its_batch(rows: list[tuple[int, int, int, int]], random: object) -> None:
    alone = [uniforms(*[[part] for part in row])[0] for row in rows]
    together = uniforms(*zip(*rows, strict=True))
    assert together.tolist() == alone
    order = list(range(len(rows)))
    random.shuffle(order)
    assert uniforms(*zip(*[rows[i] for i in order], strict=True)).tolist() == [alone[i] for i in order]


@pytest.mark.parametrize("part", range(4))
def test_every_part_of_the_counter_matters(part: int) -> None:
    base = [1, 2, 3, 4]
    other = [*base]
    other[part] += 1
    assert uniforms(*[[x] for x in base]) != uniforms(*[[x] for x in other])


def test_uniforms_are_uniform() -> None:
    n = 20_000
    u = uniforms([0] * n, [1] * n, [2] * n, range(n))
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi2 < 43.8  # 0.1 % point of chi-square with 19 degrees of freedom; the draws are fixed
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)


def test_lineages() -> None:
    assert child_lineage(77, 5, 0) == 77  # the first child goes on in its parent's stream
    lines = {child_lineage(line, position, i) for line in (0, 77) for position in (0, 5) for i in range(1, 50)}
    assert len(lines) == 2 * 2 * 49
    assert all(0 <= line < 2**64 for line in lines)


def test_streams() -> None:
    assert stream([1, 2]) == stream((1, 2)) == stream([1, 2], 0)
    assert len({stream([1, 2]), stream([2, 1]), stream([1, 2], 1), stream([1, 2, 0]), stream([12])}) == 5
