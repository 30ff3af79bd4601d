"""What the caller has switched on around a call changes nothing: inference mode, autocast, default device and dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from models import naive_logprobs, tiny

from prm_search.engine.admission import check as admission, miniature
from prm_search.engine.language_model import LanguageModel

NATS = 1e-4
TEXT = [7, 21, 8, 55, 90, 3, 14, 14, 60, 33, 41, 12]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
}
AMBIENT = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_verdicts", {})


def score(lm: LanguageModel) -> np.ndarray:
    """TEXT in two forked steps, the second decoded token by token."""
    root = lm.tree.root()
    values = lm.extend([root], [TEXT[:8]])
    tip = lm.tree.fork(root)
    values += [part for token in TEXT[8:] for part in lm.extend([tip], [[token]])]  # type: ignore[operator,union-attr]
    assert lm.extend([tip], [[]], want="log_softmax").dtype == torch.float32  # type: ignore[union-attr]
    return np.concatenate(values)  # type: ignore[arg-type]


@pytest.mark.parametrize("stepping", ["packed", "static"])
@pytest.mark.parametrize("mode", MODES)
def test_first_use_inside_a_mode(mode: str, stepping: str) -> None:
    """Inside, outside and inside again: pools and static tensors belong to no mode, and numbers do not change."""
    model = tiny("llama")
    wanted = naive_logprobs(model, TEXT)
    with MODES[mode]():
        lm = LanguageModel.of(model)
        lm.token_steps.set_mode(stepping)  # type: ignore[arg-type]
        first = score(lm)
    outside = score(lm)
    with MODES[mode]():
        again = score(lm)
    np.testing.assert_allclose(first, wanted, rtol=0, atol=NATS)
    np.testing.assert_array_equal(outside, first)
    np.testing.assert_array_equal(again, first)


def test_the_modes_are_the_callers_again_afterwards() -> None:
    lm = LanguageModel.of(tiny("llama"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        score(lm)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("ambient", AMBIENT)
def test_admission_under_an_ambient_device_or_dtype(ambient: str) -> None:
    model = tiny("llama")
    with AMBIENT[ambient]():
        dtype = torch.get_default_dtype()
        lm = LanguageModel.of(model)
        assert torch.get_default_dtype() == dtype
    np.testing.assert_allclose(score(lm), naive_logprobs(model, TEXT), rtol=0, atol=NATS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError("no memory")])
@pytest.mark.parametrize("place", ["build", "compare"])
def test_running_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch, place: str, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    model = tiny("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature if place == "build" else admission, place, fail)
        with pytest.raises(type(error), match="no memory"):
            LanguageModel.of(model)
    LanguageModel.of(model)


@pytest.mark.parametrize("place", ["compare", "_copy"])
def test_a_refusal_with_a_passing_cause_is_asked_again(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a passing cause")

    model = tiny("llama")
    with pytest.MonkeyPatch.context() as patch:
        if place == "_copy":  # neither a miniature nor a copy
            patch.setattr(miniature, "build", fail)
            patch.setattr(admission, "_copy", lambda module: None)
        else:
            patch.setattr(admission, "compare", fail)
        with pytest.raises(ValueError, match=r"not supported.*a passing cause"):
            LanguageModel.of(model)
    LanguageModel.of(model)


def test_a_verdict_on_the_family_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[type] = []
    judge = admission._judge
    monkeypatch.setattr(admission, "_judge", lambda module, make: judged.append(type(module)) or judge(module, make))
    model = tiny("llama")
    monkeypatch.setattr(model, "_is_stateful", True, raising=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="keeps a state"):
            LanguageModel.of(model)
    assert len(judged) == 1
