"""How much KV models take by default: on a GPU never more than there is, however many share it."""

from __future__ import annotations

import gc

import pytest
import torch
from models import tiny

from prm_search.engine import language_model
from prm_search.engine.admission import context_limits
from prm_search.engine.admission.context_limits import RESERVE, default_capacity
from prm_search.engine.language_model import LanguageModel

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("whole", "weights", "width"),
    [
        (141 << 30, [15 << 30] * 2, 56 << 10),  # a 7B pair
        (80 << 30, [16 << 30] * 2, 128 << 10),  # an 8B pair
        (24 << 30, [3 << 30] * 3, 28 << 10),  # three of 1.5B
    ],
)
def test_models_together_leave_a_reserve(
    monkeypatch: pytest.MonkeyPatch, whole: int, weights: list[int], width: int
) -> None:
    """Each is loaded, and promised KV, before the first forward of any makes a pool."""
    loaded = promised = 0
    monkeypatch.setattr(context_limits, "device_memory", lambda device: (whole - loaded, whole))
    for size in weights:
        loaded += size
        capacity = default_capacity(GPU, width, promised)
        assert capacity > 20_000  # and none is starved
        promised += capacity * width
    assert loaded + promised + RESERVE * whole <= whole


def test_a_full_device_gives_the_least() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_limits, "device_memory", lambda device: (1 << 30, 80 << 30))
        assert default_capacity(GPU, 1 << 10, 5 << 30) == 1024


def test_what_live_models_hold_and_were_promised_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    free = 1 << 26
    before = language_model.promised_on(torch.device("cpu"))  # whatever other tests keep alive
    monkeypatch.setattr(context_limits, "device_memory", lambda device: (free + before, 0))
    models = [tiny("llama", seed=seed) for seed in range(3)]
    lms = [LanguageModel.of(model) for model in models]
    sizes = [lm.tree.capacity * lm.token_bytes for lm in lms]
    assert sizes == pytest.approx([free / 3, free * 2 / 9, free * 4 / 27], rel=0.01)
    assert language_model.promised_on(torch.device("cpu")) == before + sum(sizes)
    lms[0].extend([lms[0].tree.root()], [[3, 4, 5]])  # its pools stand: the device reports them from now on
    assert lms[0].promised == 0
    assert language_model.promised_on(torch.device("cpu")) == before + sum(sizes[1:])
    assert language_model.promised_on(GPU) == 0


def test_a_capacity_that_was_asked_for_is_promised_too() -> None:
    model = tiny("llama")
    lm = LanguageModel.of(model, capacity=500)
    assert lm.promised == 500 * lm.token_bytes > 0
