"""Between the call and the reading of its numbers, the host asks the device for nothing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import prm_search as ps
from prm_search.engine import runner
from prm_search.engine.attention.kernel_layout import KernelLayout
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.pending import Pending
from prm_search.engine.sampler import filtered
from prm_search.sampling import Sampling
from prm_search.triton_kernels import reference

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: a number of a tensor, a shape that its values decide."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise AssertionError(f"{func} waits for the device")
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, "a boolean index waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' layout, with their oracles; no shortcuts by values that a CPU has at hand."""

    def refuse(self: torch.Tensor, *_: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    def launched(begin: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with NoWaiting(), pytest.MonkeyPatch.context() as reads:
                for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu"):
                    reads.setattr(torch.Tensor, name, refuse)
                return begin(*args, **kwargs)

        return call

    def write(k_pool: Any, v_pool: Any, k_new: Any, v_new: Any, slots: Any) -> None:
        reference._write_kept(k_pool, v_pool, k_new, v_new, slots >= 0, slots.long())

    monkeypatch.setattr(reference, "write_kv", write)
    ops = sys.modules["prm_search.triton_kernels.linear_logprob"]
    monkeypatch.setattr(ops, "_check", lambda *_: None)  # target ids are looked at on a CPU only
    monkeypatch.setattr(runner, "layout_of", lambda run, units: KernelLayout(units, "auto"))
    for name in ("begin_extend", "begin_round", "begin_score"):
        monkeypatch.setattr(LanguageModel, name, launched(getattr(LanguageModel, name)))


@pytest.mark.parametrize("mode", ["packed", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt-neox", "cohere", "deepseek-v3", "qwen2-moe"])
def test_a_call_is_launched_without_waiting(name: str, mode: str) -> None:
    model = tiny(name)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("batched_mm")
    lm = LanguageModel(model, None, capacity=60)
    lm.token_steps.set_mode(mode)  # type: ignore[arg-type]
    root = lm.tree.root()
    assert isinstance(lm.begin_extend([root], [list(range(3, 15))]), Pending)
    tips = [lm.tree.fork(root) for _ in range(3)]
    for token in range(3, 9):
        lm.begin_extend(tips, [[token]] * 3, want="log_softmax").result()
    lm.begin_extend([lm.tree.fork(root, at=5)], [list(range(40))], want="target").result()  # evicts
    forks = [lm.tree.fork(tip, [5, 6, 7]) for tip in tips]
    for values in lm.score(forks):
        assert np.isfinite(values).all()


def test_the_second_model_is_launched_before_the_first_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In scoring a pair, and in a steered decoding of three models."""
    policy, prm, other = (LanguageModel(tiny("llama", seed=seed), None, capacity=400) for seed in range(3))
    said: list[tuple[str, LanguageModel]] = []
    for name in ("begin_round", "begin_score"):
        begin = getattr(LanguageModel, name)
        monkeypatch.setattr(
            LanguageModel,
            name,
            lambda self, *args, begin=begin, **options: (said.append(("begin", self)), begin(self, *args, **options))[
                1
            ],
        )
    result = Pending.result
    monkeypatch.setattr(Pending, "result", lambda self: (said.append(("wait", policy)), result(self))[1])
    pair = ps.ImplicitPRM(prm, other)
    tree = ps.SearchTree(ps.Prompt(token_ids=(3, 4, 5)))
    pair.score_nodes([tree.add(tree.root, token_ids=[6, 7, 8])])
    assert [word for word, _ in said] == ["begin", "begin", "wait", "wait"]
    assert [lm for word, lm in said if word == "begin"] == [prm, other]
    said.clear()
    sampler = ps.HFPolicy(policy, Ids(), stop_ids=[])
    ps.search(
        [[3, 4, 5]], policy=sampler, scorer=pair, strategy=ps.Steer(1.0), max_new_tokens=4,
        steps=ps.StepRule(delimiter=None, max_tokens=4),
    )  # fmt: skip
    rounds = "".join("b" if word == "begin" else "w" for word, _ in said)
    assert rounds.count("bbbwww") == 4


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.5}], ids=str)
def test_filters_hand_the_device_no_number_of_their_own(
    filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor made of Python's numbers is a copy that waits for all that is under way."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor is made of numbers of the host")

    logits = torch.linspace(-3, 3, 24).view(2, 12)
    monkeypatch.setattr(torch, "tensor", refuse)
    with NoWaiting():
        scores = filtered(logits, Sampling(ps.StepRule(), max_new_tokens=1, **filters))
    assert (scores.isinf().any().item()) == ("temperature" not in filters)


class Ids:
    """A tokenizer of numbers."""

    all_special_ids = (0,)
    eos_token_id = 0

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<{token_id}>"

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def encode(self, text: str, **kwargs: object) -> list[int]:
        return [1]

    def decode(self, ids: list[int], **kwargs: object) -> str:
        return "".join(f"<{i}>" for i in ids)
