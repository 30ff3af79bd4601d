"""Attention over packed layouts against one softmax a query, in every shape of work a forward can bring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from soak import examples

from prm_search.engine.attention import torch_layout
from prm_search.engine.attention.kernel_layout import KernelLayout
from prm_search.engine.attention.layout import Operands, QueryRun, ScoreModifiers, buckets
from prm_search.engine.attention.torch_layout import TorchLayout

HEADS, KV_HEADS, K_DIM = 4, 2, 8


def make(draw: np.random.Generator, shapes: list[tuple[int, list[tuple[int, int]]]], v_dim: int):
    """Units of families [(shared, [(own before, new), ...]), ...] over a pool, in random slots."""
    total = sum(shared + sum(own + new for own, new in members) for shared, members in shapes)
    slots = draw.permutation(total + 5)
    units, at = [], 0
    for stem, (shared, members) in enumerate(shapes):
        prefix = slots[at : at + shared]
        at += shared
        for own, new in members:
            units.append(
                QueryRun(np.concatenate([prefix, slots[at : at + own + new]]).astype(np.int64), new, stem, shared)
            )
            at += own + new
    generator = torch.Generator().manual_seed(int(draw.integers(1 << 30)))
    keys = torch.randn(total + 5, KV_HEADS, K_DIM, generator=generator, dtype=torch.float64)
    values = torch.randn(total + 5, KV_HEADS, v_dim, generator=generator, dtype=torch.float64)
    query = torch.randn(HEADS, sum(unit.new for unit in units), K_DIM, generator=generator, dtype=torch.float64)
    return units, query, keys, values


def oracle(units, order, query, keys, values, modifiers: ScoreModifiers) -> torch.Tensor:
    """One softmax a query and head."""
    rows, at = [], 0
    for i in order:
        unit = units[i]
        for j in range(unit.new):
            position = len(unit.path) - unit.new + j
            low = 0 if modifiers.window is None else max(0, position + 1 - modifiers.window)
            seen = torch.from_numpy(unit.path[low : position + 1])
            heads = []
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                scores = keys[seen, kv] @ query[head, at + j] * modifiers.scale
                if modifiers.softcap is not None:
                    scores = modifiers.softcap * torch.tanh(scores / modifiers.softcap)
                if modifiers.sinks is not None:
                    scores = torch.cat([scores, modifiers.sinks[head : head + 1]])
                weights = scores.softmax(0)[: len(seen)]
                heads.append(weights @ values[seen, kv])
            rows.append(torch.stack(heads))
        at += unit.new
    return torch.stack(rows)


def run(layout, units, query, keys, values, modifiers: ScoreModifiers) -> torch.Tensor:
    new = torch.cat([torch.from_numpy(units[i].path[-units[i].new :]) for i in layout.order])
    return layout.attend(
        Operands(query, keys[new].transpose(0, 1), values[new].transpose(0, 1), keys, values, modifiers)
    )


members = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4)
families = st.lists(st.tuples(st.integers(0, 12), members), min_size=1, max_size=4)


@settings(max_examples=examples(60))
@given(
    families,
    st.integers(0, 1 << 30),
    st.sampled_from([None, 1, 3, 40]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([8, 4]),
    st.sampled_from([1, 6, 1000]),
)
def test_every_layout_equals_one_softmax_a_query(shapes, seed, window, softcap, sinks, v_dim, shared_from):
    units, query, keys, values = make(np.random.default_rng(seed), shapes, v_dim)
    modifiers = ScoreModifiers(
        0.4, softcap, window, torch.linspace(-1, 1, HEADS, dtype=torch.float64) if sinks else None
    )
    before, torch_layout.SHARED_FROM = torch_layout.SHARED_FROM, shared_from
    try:
        layouts = [TorchLayout(units), KernelLayout(units, "auto")]
    finally:
        torch_layout.SHARED_FROM = before
    for layout in layouts:
        assert sorted(layout.order) == list(range(len(units)))
        got = run(layout, units, query, keys, values, modifiers)
        assert (got - oracle(units, layout.order, query, keys, values, modifiers)).abs().max() < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("path", [range(3, 15), [3, 4, 6, 5, 7], [9]], ids=["a run", "scattered", "one"])
def test_one_token_alone_reads_its_path_where_it_lies(path, window, softcap, monkeypatch):
    """Without a copy of neighbouring slots, where the scores are plain."""
    draw = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(*size, generator=draw, dtype=torch.float64)
        for size in ((HEADS, 1, K_DIM), (20, KV_HEADS, K_DIM), (20, KV_HEADS, 4))
    )
    units, modifiers, copies = [QueryRun(np.array(path), 1)], ScoreModifiers(0.4, softcap, window), []
    select = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *given: (copies.append(given), select(*given))[1])
    got = run(TorchLayout(units), units, query, keys, values, modifiers)
    assert (len(copies) == 0) == (softcap is None and list(path) != [3, 4, 6, 5, 7])
    assert (got - oracle(units, [0], query, keys, values, modifiers)).abs().max() < 1e-12


def test_a_shared_prefix_is_gathered_once_for_its_family(monkeypatch):
    units, query, keys, values = make(np.random.default_rng(0), [(64, [(0, 1)] * 8), (0, [(50, 1)])], K_DIM)
    gathered = []
    select = torch.Tensor.index_select

    def counting(self, dim, index):
        gathered.append(index.numel())
        return select(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counting)
    run(TorchLayout(units), units, query, keys, values, ScoreModifiers(0.4))
    assert sum(gathered) == 2 * (64 + 51)  # keys and values; the siblings' own token is fresh


@pytest.mark.parametrize("shapes", [[(1, 5)] * 40, [(1, n) for n in range(1, 400, 7)], [(n, n) for n in (3, 3, 9, 4)]])
def test_buckets_hold_all_work_once_with_little_padding(shapes):
    batches = buckets(shapes)
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    for batch in batches:
        padded = len(batch) * max(shapes[i][0] for i in batch) * max(shapes[i][1] for i in batch)
        assert padded <= 1.25 * sum(shapes[i][0] * shapes[i][1] for i in batch) + 8192
        fresh = {shapes[i][0] == shapes[i][1] for i in batch}
        assert len(fresh) == 1
