"""The packed, forked, evicted forward gives each family's own log-probs, and leaves the model as it was."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, VOCABULARY, naive_logprobs, naive_rows, tiny

from prm_search.engine.kv_tree import Branch
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.node_logprobs import node_logprobs
from prm_search.tree import Prompt, SearchTree
from prm_search.usage import Meter

NATS = 1e-4


class Grower:
    """Grows a forest at random through one model and remembers what the model said of each token."""

    def __init__(self, lm: LanguageModel, seed: int, longest: int) -> None:
        self.lm = lm
        self.random = random.Random(seed)
        self.longest = longest
        self.meter = Meter()
        self.said: dict[Branch, list[float]] = {}

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(3, VOCABULARY) for _ in range(count)]

    def append(self, branches: list[Branch], counts: list[int]) -> None:
        values = self.lm.extend(branches, [self.ids(count) for count in counts], want="target")
        assert isinstance(values, list)
        for branch, new in zip(branches, values, strict=True):
            self.said.setdefault(branch, []).extend(new.tolist())

    def grow(self, prompts: int, rounds: int) -> None:
        roots = [self.lm.tree.root((), self.meter) for _ in range(prompts)]
        self.append(roots, [self.random.randint(2, 30) for _ in roots])
        for _ in range(rounds):
            chosen: list[Branch] = []
            for branch in self.random.sample(list(self.said), min(4, len(self.said))):
                way = self.random.random()
                if way < 0.25 and not branch.children and branch not in chosen:
                    chosen.append(branch)  # goes on where it ended
                elif way < 0.45:
                    chosen.append(self.lm.tree.fork(branch, at=self.random.randint(1, branch.length)))
                else:
                    chosen.append(self.lm.tree.fork(branch))
            chosen = [branch for branch in chosen if branch.length < self.longest - 12]
            self.append(chosen, [self.random.randint(1, 12) for _ in chosen])

    def check(self, model: Any, nats: float) -> float:
        worst = 0.0
        for branch, said in self.said.items():
            ids = branch.path_ids()
            expected = naive_logprobs(model, ids)[len(ids) - len(said) :]
            np.testing.assert_allclose(said, expected, rtol=0, atol=nats)
            worst = max(worst, float(np.nanmax(np.abs(np.array(said) - expected), initial=0.0)))
        leaves = [branch for branch in self.said if not branch.children]
        rows = self.lm.extend(leaves, [()] * len(leaves), want="log_softmax")
        assert isinstance(rows, torch.Tensor)
        for row, leaf in zip(rows.numpy(), leaves, strict=True):
            np.testing.assert_allclose(row, naive_rows(model, leaf.path_ids())[-1], rtol=0, atol=nats)
        return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_incremental_is_a_full_encode(family: str) -> None:
    model = tiny(family)
    lm = LanguageModel.of(model, capacity=130)  # the forest has about 400 tokens, its longest path 120
    grower = Grower(lm, seed=1, longest=120)
    grower.grow(prompts=3, rounds=16)
    assert max(branch.length for branch in grower.said) > 50  # well past every window
    grower.check(model, NATS)
    assert grower.meter.counts["reencoded", lm.id] > 100


@pytest.mark.parametrize("seed", range(4))
def test_any_tree_shape(seed: int) -> None:
    model = tiny("gemma3", seed=seed, attention="sdpa")
    grower = Grower(LanguageModel.of(model, capacity=64 + 40 * seed), seed=seed, longest=60)
    grower.grow(prompts=1 + seed, rounds=20)
    grower.check(model, NATS)


def test_float64_is_exact() -> None:
    model = tiny("gpt2").double()  # no part of it falls back to fp32, as rotary angles and RMS norms do
    grower = Grower(LanguageModel.of(model, capacity=100), seed=3, longest=90)
    grower.grow(prompts=2, rounds=12)
    assert grower.check(model, 1e-10) < 1e-10


def test_float64_eviction_changes_nothing() -> None:
    model = tiny("llama").double()
    said = []
    for capacity in (70, 90, 4000):
        lm = LanguageModel(model, None, capacity=capacity)
        grower = Grower(lm, seed=5, longest=64)
        grower.grow(prompts=2, rounds=12)
        said.append(np.concatenate([np.array(values) for values in grower.said.values()]))
    np.testing.assert_allclose(said[0], said[2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(said[1], said[2], rtol=0, atol=1e-12)


def test_bf16_memo_is_unchanged_by_eviction_and_batch_shape() -> None:
    model = tiny("mistral-window").bfloat16()
    lm = LanguageModel.of(model, capacity=64)
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    tree = SearchTree(Prompt(token_ids=ids(20)))
    steps = [tree.add(tree.root, token_ids=ids(7)) for _ in range(3)]
    first = [values.copy() for values in node_logprobs(lm, steps)]
    below = [tree.add(step, token_ids=ids(9)) for step in steps]
    second = [node_logprobs(lm, [node])[0].copy() for node in below]  # one at a time ...
    for _ in range(3):  # ... then crowded out by other searches
        other = SearchTree(Prompt(token_ids=ids(40)))
        node_logprobs(lm, [other.add(other.root, token_ids=ids(20))])
    assert not lm.memo(tree).branch(below[0]).encoded
    grown = [tree.add(node, token_ids=ids(5)) for node in below]
    node_logprobs(lm, grown)  # re-encodes all of it, together
    assert tree.meter.counts["reencoded", lm.id] > 0
    for known, again in zip(first + second, node_logprobs(lm, steps + below), strict=True):
        assert known.tobytes() == again.tobytes()


def test_bf16_agrees_with_a_plain_forward() -> None:
    model = tiny("qwen2").bfloat16()
    grower = Grower(LanguageModel.of(model, capacity=100), seed=3, longest=90)
    grower.grow(prompts=2, rounds=8)
    apart = []
    for branch, said in grower.said.items():
        ids = branch.path_ids()
        apart.append(np.abs(np.array(said) - naive_logprobs(model, ids)[len(ids) - len(said) :]))
    assert np.nanmean(np.concatenate(apart)) < 0.15


# --- plain generate ------------------------------------------------------------------------------------------------


def generated(model: Any) -> tuple[bytes, bytes]:
    out = model.generate(
        torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]),
        attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        do_sample=False,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences.numpy().tobytes(), torch.stack(out.logits).numpy().tobytes()


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma3", "eager"), ("gpt-oss", "eager")])
def test_plain_generate_is_bit_identical(family: str, attention: str) -> None:
    model = tiny(family, attention=attention)
    twin = type(model)(model.config).eval()  # another model on the same config object
    assert twin.config is model.config
    before = generated(model), generated(twin)
    lm = LanguageModel.of(model, capacity=200)
    root = lm.tree.root()
    lm.extend([root], [[5, 6, 7, 8]])
    between = generated(model), generated(twin)
    lm.extend([lm.tree.fork(root)], [[9, 10]])
    assert between == before
    assert (generated(model), generated(twin)) == before
    assert model.config._attn_implementation == attention


def test_plain_generate_in_another_thread_while_we_are_inside_a_forward() -> None:
    model = tiny("gemma2")
    twin = type(model)(model.config).eval()
    lm = LanguageModel.of(model, capacity=200)
    expected = generated(model), generated(twin)
    rows = naive_logprobs(model, [5, 6, 7, 8, 9])
    seen = []

    def meanwhile(module: Any, args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append((generated(model), generated(twin))))
            thread.start()
            thread.join()

    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(meanwhile)
    said = lm.extend([lm.tree.root()], [[5, 6, 7, 8, 9]])
    hook.remove()
    assert seen == [expected]
    np.testing.assert_allclose(said[0], rows, rtol=0, atol=NATS)


def test_two_threads_two_models_one_config() -> None:
    model = tiny("llama")
    twin = copy.deepcopy(model)
    twin.config = model.config
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = model.config
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    text = [random.Random(1).randrange(3, VOCABULARY) for _ in range(30)]
    wrong = []

    def work(part: Any) -> None:
        lm, expected = LanguageModel.of(part, capacity=60), naive_logprobs(part, text)
        for _ in range(20):
            root = lm.tree.root()
            said = np.concatenate(lm.extend([root], [text[:11]]) + lm.extend([lm.tree.fork(root)], [text[11:]]))
            if not np.allclose(said, expected, atol=NATS, rtol=0, equal_nan=True):
                wrong.append(part)
            lm.tree.release(root)

    threads = [threading.Thread(target=work, args=(part,)) for part in (model, twin, model, twin)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.config._attn_implementation == "eager"
