"""LanguageModel: what it counts, what it keeps, what it refuses, and what is left after a failure."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCABULARY, naive_logprobs, naive_rows, tiny

from prm_search.engine.language_model import LanguageModel
from prm_search.engine.node_logprobs import node_logprobs
from prm_search.engine.pool import KVPool
from prm_search.tree import Node, Prompt, SearchTree
from prm_search.usage import Meter

NATS = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture
def lm(model: Any) -> LanguageModel:
    return LanguageModel(model, None, capacity=300)


def ids(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(count)]


def grown(lm: LanguageModel, prompt: int = 12) -> tuple[SearchTree, list[Node]]:
    """A prompt, two steps, three below the first of them."""
    tree = SearchTree(Prompt(token_ids=ids(prompt, seed=1)))
    upper = [tree.add(tree.root, token_ids=ids(n, seed=n)) for n in (5, 9)]
    lower = [tree.add(upper[0], token_ids=ids(n, seed=n)) for n in (1, 4, 7)]
    return tree, [*upper, *lower]


# --- counts --------------------------------------------------------------------------------------------------------


def test_each_token_is_encoded_once(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = KVPool.write
    monkeypatch.setattr(
        KVPool,
        "write",
        lambda pool, layer, slots, *rest: (written.append(len(slots)), write(pool, layer, slots, *rest))[1],
    )
    tree, nodes = grown(lm)
    node_logprobs(lm, nodes[:2])
    node_logprobs(lm, nodes)
    node_logprobs(lm, nodes)
    tokens = 12 + sum(len(node.token_ids) for node in nodes)
    assert tree.meter.counts["encoded", lm.id] == tokens
    assert tree.meter.counts["reencoded", lm.id] == 0
    assert sum(written) == tokens * lm.config.num_hidden_layers  # forks copied nothing
    assert lm.tree.used == tokens
    assert lm.forwards == 2


def test_a_fork_writes_nothing(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lm.tree.root()
    lm.extend([root], [ids(40)])
    kept = {layer: (k.clone(), v.clone()) for layer, (k, v) in lm.pool.layers.items()}
    places = {layer: (k.data_ptr(), v.data_ptr()) for layer, (k, v) in lm.pool.layers.items()}
    monkeypatch.setattr(KVPool, "write", lambda *args: pytest.fail("a fork wrote KV"))
    forks = [lm.tree.fork(root) for _ in range(100)] + [lm.tree.fork(root, at=n) for n in range(41)]
    assert len(forks) == 141
    assert lm.tree.used == 40
    for layer, (k, v) in lm.pool.layers.items():
        used = root.slots[:40]
        assert places[layer] == (k.data_ptr(), v.data_ptr())
        assert torch.equal(k[used], kept[layer][0][used])
        assert torch.equal(v[used], kept[layer][1][used])


def test_tokens_are_encoded_again_only_after_eviction(model: Any) -> None:
    lm = LanguageModel(model, None, capacity=48)
    tree, nodes = grown(lm)
    first = [values.copy() for values in node_logprobs(lm, nodes)]
    assert tree.meter.counts["reencoded", lm.id] == 0
    other = SearchTree(Prompt(token_ids=ids(48, seed=9)))
    lm.extend([lm.memo(other).branch(other.root)], [()], want=None)  # takes every slot
    child = tree.add(nodes[2], token_ids=ids(3, seed=77))
    node_logprobs(lm, [child])
    path = 12 + len(nodes[0].token_ids) + len(nodes[2].token_ids)
    assert tree.meter.counts["reencoded", lm.id] == path
    assert tree.meter.counts["encoded", lm.id] == 12 + sum(len(n.token_ids) for n in [*nodes, child])
    for known, again in zip(first, node_logprobs(lm, nodes), strict=True):
        assert known.tobytes() == again.tobytes()


def test_a_decoded_token_costs_one_forward_of_one_token(lm: LanguageModel) -> None:
    meter = Meter()
    root = lm.tree.root((), meter)
    lm.extend([root], [ids(10)])
    for n in range(5):
        lm.extend([root], [[7 + n]], want="log_softmax")
    assert (lm.forwards, meter.counts["encoded", lm.id]) == (6, 15)
    lm.extend([root], [()], want="log_softmax")  # known already: from the kept row
    assert lm.forwards == 6


# --- waves ---------------------------------------------------------------------------------------------------------


def test_long_work_is_cut_into_forwards(model: Any) -> None:
    lm = LanguageModel(model, None, capacity=300, forward_tokens=16)
    root = lm.tree.root()
    said = lm.extend([root], [ids(50)])
    assert lm.forwards == 4
    np.testing.assert_allclose(said[0], naive_logprobs(model, ids(50)), rtol=0, atol=NATS)
    forks = [lm.tree.fork(root) for _ in range(3)]
    said = lm.extend(forks, [ids(20, seed=n) for n in range(3)])
    for n, values in enumerate(said):
        np.testing.assert_allclose(values, naive_logprobs(model, ids(50) + ids(20, seed=n))[50:], rtol=0, atol=NATS)


def test_what_exceeds_the_capacity_together_goes_in_waves(model: Any) -> None:
    lm = LanguageModel(model, None, capacity=40)
    root = lm.tree.root()
    lm.extend([root], [ids(20)])
    forks = [lm.tree.fork(root) for _ in range(5)]
    said = lm.extend(forks, [ids(15, seed=n) for n in range(5)])  # 95 tokens in 40 slots
    assert lm.forwards == 1 + 5
    for n, values in enumerate(said):
        np.testing.assert_allclose(values, naive_logprobs(model, ids(20) + ids(15, seed=n))[20:], rtol=0, atol=NATS)


def test_ancestors_and_children_in_one_call(lm: LanguageModel, model: Any) -> None:
    root = lm.tree.root(ids(6))
    child = lm.tree.fork(root, ids(3, seed=1))
    grandchild = lm.tree.fork(child, ids(4, seed=2))
    said = lm.score([root, child, grandchild])
    assert lm.forwards == 1
    expected = naive_logprobs(model, ids(6) + ids(3, seed=1) + ids(4, seed=2))
    np.testing.assert_allclose(np.concatenate(said), expected, rtol=0, atol=NATS)


def test_a_path_that_leaves_a_branch_early_needs_room_for_itself_only(model: Any) -> None:
    lm = LanguageModel(model, None, capacity=40)
    long = lm.tree.root()
    lm.extend([long], [ids(38)])
    side = lm.tree.fork(long, at=10)
    said = lm.extend([side], [ids(30, seed=3)])
    np.testing.assert_allclose(said[0], naive_logprobs(model, ids(10) + ids(30, seed=3))[10:], rtol=0, atol=NATS)
    again = lm.extend([lm.tree.fork(long)], [[5, 6]])
    np.testing.assert_allclose(again[0], naive_logprobs(model, [*ids(38), 5, 6])[38:], rtol=0, atol=NATS)


@pytest.mark.parametrize("at", range(8))
def test_forks_near_their_parents_start(model: Any, at: int) -> None:
    """With what lends the slots evicted in between."""
    lm = LanguageModel(model, None, capacity=24)
    root = lm.tree.root()
    lm.extend([root], [ids(5)])
    child = lm.tree.fork(root)
    lm.extend([child], [ids(3, seed=1)])
    fork = lm.tree.fork(child, at=at)
    path = (ids(5) + ids(3, seed=1))[:at]
    lm.extend([fork], [ids(2, seed=2)])
    lm.extend([lm.tree.root()], [ids(16, seed=3)])
    said = lm.extend([lm.tree.fork(fork)], [ids(4, seed=4)])
    expected = naive_logprobs(model, path + ids(2, seed=2) + ids(4, seed=4))[at + 2 :]
    np.testing.assert_allclose(said[0], expected, rtol=0, atol=NATS)


SHARED_ENDS = {  # (capacity, forward_tokens), forks as (parent, own tokens), calls as (branches, new tokens of each)
    "the second batch left nothing to encode for the third": (
        (16, 4096), [(None, 3), (0, 5), (1, 0), (None, 14)], [([1, 3, 2], [0, 0, 0])],
    ),
    "a parent after its child": ((16, 5), [(None, 3), (0, 5)], [([1, 0], [2, 0])]),
    "an empty fork beside its growing parent": ((40, 4096), [(None, 3), (0, 5), (1, 0)], [([2, 1], [0, 2])]),
    "an empty fork after its parent has grown": ((40, 4096), [(None, 3), (0, 5), (1, 0)], [([1], [2]), ([2], [0])]),
    "a fork scored after its parent has grown": ((24, 4), [(None, 3), (0, 5), (1, 0)], [([1], [2]), ([2], [4])]),
    "empty forks of an empty fork, evicted between": (
        (16, 4096),
        [(None, 3), (0, 4), (1, 0), (2, 0), (None, 16)],
        [([1], [3]), ([4], [0]), ([3, 4, 2], [0, 0, 1]), ([2, 3], [0, 2])],
    ),
    "many that end at one place, with what evicts it among them": (
        (12, 4096), [(None, 6), (0, 0), (0, 0), (1, 0), (None, 12)], [([0, 4, 1, 2, 3], [0, 0, 0, 3, 0])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("want", ["target", "log_softmax"])
@pytest.mark.parametrize("name", SHARED_ENDS)
def test_shared_ends_give_what_a_fresh_tree_gives(model: Any, name: str, want: Any) -> None:
    (capacity, forward_tokens), forks, calls = SHARED_ENDS[name]
    lm = LanguageModel(model, None, capacity=capacity, forward_tokens=forward_tokens)
    made: list[Any] = []
    for seed, (parent, own) in enumerate(forks):
        new = ids(own, seed)
        made.append(lm.tree.root(new) if parent is None else lm.tree.fork(made[parent], new))
    for picked, counts in calls:
        before = [made[i].length for i in picked]
        said: Any = lm.extend([made[i] for i in picked], [ids(n, seed=50 + n) for n in counts], want=want)
        for i, start, values in zip(picked, before, said, strict=True):
            path = made[i].path_ids()
            expected = naive_logprobs(model, path)[start:] if want == "target" else naive_rows(model, path)[-1]
            np.testing.assert_allclose(values, expected, rtol=0, atol=NATS)


# --- what is asked for ---------------------------------------------------------------------------------------------


def test_the_first_token_of_all_has_no_log_probability(lm: LanguageModel) -> None:
    said = lm.extend([lm.tree.root()], [ids(4)])[0]
    assert np.isnan(said[0])
    assert np.isfinite(said[1:]).all()
    assert said.dtype == np.float32


def test_rows(lm: LanguageModel, model: Any) -> None:
    branches = [lm.tree.root(), lm.tree.root()]
    rows = lm.extend(branches, [ids(4), ids(9, seed=1)], want="log_softmax")
    assert isinstance(rows, torch.Tensor)
    assert rows.dtype == torch.float32
    for row, text in zip(rows.numpy(), (ids(4), ids(9, seed=1)), strict=True):
        np.testing.assert_allclose(row, naive_rows(model, text)[-1], rtol=0, atol=NATS)
    hidden = lm.extend(branches, [(), ()], want="hidden")
    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape == (2, model.config.hidden_size)
    assert lm.extend(branches, [[5], [6]], want=None) is None


def test_an_empty_branch_speaks_for_its_parent(lm: LanguageModel, model: Any) -> None:
    root = lm.tree.root()
    lm.extend([root], [ids(6)])
    empty = lm.tree.fork(lm.tree.fork(root))
    rows = lm.extend([empty], [()], want="log_softmax")
    assert isinstance(rows, torch.Tensor)
    np.testing.assert_allclose(rows[0].numpy(), naive_rows(model, ids(6))[-1], rtol=0, atol=NATS)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_bad_calls(lm: LanguageModel) -> None:
    root = lm.tree.root()
    with pytest.raises(ValueError, match="path of 301 tokens exceeds the KV capacity of 300"):
        lm.extend([root], [ids(301)])
    with pytest.raises(ValueError, match="path of 257 tokens exceeds the model's context of 256"):
        lm.extend([root], [ids(257)])
    with pytest.raises(ValueError, match=f"token ids 5..{VOCABULARY} lie outside the vocabulary of {VOCABULARY}"):
        lm.extend([root], [[5, VOCABULARY]])
    with pytest.raises(ValueError, match=r"token ids -1..5 lie outside"):
        lm.extend([root], [[5, -1]])
    with pytest.raises(ValueError, match="an empty path"):
        lm.extend([root], [()])
    with pytest.raises(ValueError, match="1 branches but 2 lists"):
        lm.extend([root], [[5], [6]])
    with pytest.raises(ValueError, match="stands twice"):
        lm.extend([root, root], [[5], [6]])
    assert (root.token_ids, root.encoded, lm.forwards) == ([], 0, 0)
    lm.tree.release(root)
    with pytest.raises(ValueError, match="released"):
        lm.extend([root], [[5]])


def test_a_path_beyond_the_capacity(model: Any) -> None:
    lm = LanguageModel(model, None, capacity=20)
    root = lm.tree.root()
    lm.extend([root], [ids(20)])
    with pytest.raises(ValueError, match="path of 21 tokens exceeds the KV capacity of 20"):
        lm.extend([lm.tree.fork(root)], [[5]])


def test_scoring_needs_a_branch_that_was_not_encoded(lm: LanguageModel) -> None:
    root = lm.tree.root()
    lm.extend([root], [ids(5)])
    with pytest.raises(ValueError, match="has been encoded before"):
        lm.score([root])


def test_training_mode() -> None:
    model = tiny("llama")
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*call \.eval\(\)"):
        LanguageModel.of(model)
    model.eval()
    served = LanguageModel.of(model)
    model.train()
    root = served.tree.root()
    with pytest.raises(ValueError, match="training mode"):
        served.extend([root], [ids(5)])
    assert (root.token_ids, served.tree.used) == ([], 0)
    model.eval()
    served.extend([root], [ids(5)])


def test_not_a_causal_lm() -> None:
    with pytest.raises(TypeError, match="a causal LM"):
        LanguageModel.of("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Linear is not a transformers causal LM"):
        LanguageModel.of(torch.nn.Linear(2, 2))


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_tokens", [4096, 8])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_failed_forward_leaves_things_as_they_were(model: Any, layer: int, forward_tokens: int) -> None:
    lm = LanguageModel(model, None, capacity=60, forward_tokens=forward_tokens)
    root = lm.tree.root()
    lm.extend([root], [ids(10)])
    fork, twin = lm.tree.fork(root), lm.tree.fork(root)
    before = lm.tree.used, lm.extend([root], [()], want="log_softmax")
    calls = iter([False, True]) if forward_tokens == 8 else iter([True])  # where there are several forwards: the second

    def fail(*args: Any) -> None:
        if next(calls, False):
            raise torch.OutOfMemoryError("no memory left")

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        lm.extend([root, fork, twin], [[5, 6, 7], ids(6, seed=1), ids(3, seed=2)])
    hook.remove()
    assert [len(branch.token_ids) for branch in (root, fork, twin)] == [10, 0, 0]
    assert lm.tree.used == before[0]
    assert not any(branch.pins for branch in (root, fork, twin))
    assert model.config._attn_implementation == "eager"
    after = lm.extend([root], [()], want="log_softmax")
    assert torch.equal(after, before[1])  # type: ignore[arg-type]
    lm.extend([lm.tree.root()], [ids(60, seed=5)])  # evicts all of it
    said = lm.extend([root, fork, twin], [[5, 6, 7], ids(6, seed=1), ids(3, seed=2)])
    for values, new in zip(said, ([5, 6, 7], ids(6, seed=1), ids(3, seed=2)), strict=True):
        np.testing.assert_allclose(values, naive_logprobs(model, ids(10) + new)[10:], rtol=0, atol=NATS)


@pytest.mark.parametrize("mode", ["packed", "static"])
def test_numbers_that_are_found_wrong_later_are_taken_back(mode: str) -> None:
    """Also below a child that stays, and where the parent's last row had been handed to a child."""
    model = tiny("llama")
    lm = LanguageModel(model, None, capacity=60)
    lm.token_steps.set_mode(mode)  # type: ignore[arg-type]
    root, above = lm.tree.root(), lm.tree.root([7, 3, 4])
    lm.extend([root], [ids(10)])
    child, under = lm.tree.fork(root), lm.tree.fork(above)
    lm.extend([child], [[5]])
    row = model.model.embed_tokens.weight.data[7]
    good = row.clone()
    row.fill_(torch.nan)
    for branch, new in ((root, [7, 8]), (under, [5])):
        with pytest.raises(ValueError, match="not numbers"):
            lm.extend([branch], [new])
    row.copy_(good)
    assert (root.encoded, above.encoded, under.encoded, lm.tree.used) == (10, 0, 0, 11)
    for branch, new in ((root, [8, 9]), (under, [5]), (child, [6])):
        (said,) = lm.extend([branch], [new])  # type: ignore[misc]
        np.testing.assert_allclose(said, naive_logprobs(model, branch.path_ids())[-len(new) :], rtol=0, atol=NATS)


# --- interning and lifetimes ---------------------------------------------------------------------------------------


def test_one_module_is_one_language_model() -> None:
    model = tiny("llama", seed=3)
    first = LanguageModel.of(model, capacity=64)
    assert LanguageModel.of(model) is first
    assert LanguageModel.of(first) is first  # type: ignore[arg-type]
    assert LanguageModel.of(torch.compile(model)) is first  # type: ignore[arg-type]
    assert LanguageModel.of(model, capacity=64) is first
    with pytest.raises(ValueError, match=r"capacity=65: .* in use with 64"):
        LanguageModel.of(model, capacity=65)
    assert LanguageModel.of(tiny("llama", seed=3)).id != first.id


def test_one_memo_a_search() -> None:
    lm = LanguageModel.of(tiny("llama"), capacity=100)
    tree, nodes = grown(lm)
    assert lm.memo(tree) is lm.memo(tree)
    node_logprobs(lm, nodes)
    assert lm.tree.used > 0
    lm.release(tree)
    assert lm.tree.used == 0
    lm.release(tree)  # again changes nothing
    node_logprobs(lm, nodes)  # and it can be scored anew


def test_a_search_that_is_dropped_frees_its_memo() -> None:
    lm = LanguageModel.of(tiny("llama"), capacity=100)
    tree, nodes = grown(lm)
    node_logprobs(lm, nodes)
    seen = weakref.ref(lm.memo(tree))
    lm.release(tree)
    del tree, nodes
    gc.collect()
    assert seen() is None


def test_dropping_everything_frees_the_pools() -> None:
    model = tiny("llama")
    lm = LanguageModel.of(model, capacity=100)
    tree, nodes = grown(lm)
    node_logprobs(lm, nodes)
    seen = [weakref.ref(x) for x in (lm, lm.pool, model, lm.pool.layers[0][0])]
    lm.release(tree)
    del lm, model, tree, nodes
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4


def test_pools_go_with_the_last_user() -> None:
    """Not with the next garbage collection, whether trees were released or not: they are half of a GPU's memory."""
    lm = LanguageModel(tiny("llama"), None, capacity=100)
    node_logprobs(lm, grown(lm)[1])
    lm.token_steps.set_mode("static")
    root = lm.tree.root(ids(5))
    lm.extend([root], [[]])
    lm.extend([root], [[5]])
    seen = weakref.ref(lm.pool), weakref.ref(lm.pool.layers[0][0])
    lm.tree.release(root)
    gc.disable()
    try:
        del lm, root
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_a_language_model_that_is_dropped_is_made_anew() -> None:
    model = tiny("llama")
    first = LanguageModel.of(model, capacity=64)
    name, seen = first.id, weakref.ref(first)
    del first
    gc.collect()
    assert seen() is None
    again = LanguageModel.of(model, capacity=80)
    assert again.id != name
    assert again.tree.capacity == 80
