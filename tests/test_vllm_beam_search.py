"""Beam search inside vLLM and steering: refused where a request asks for both."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from prm_search.integrations.vllm.beam_search import refuse_steered_beams

NAMES = {"completion": "CompletionRequest", "chat_completion": "ChatCompletionRequest"}


@pytest.fixture
def requests(monkeypatch):
    """A server's request classes, as vLLM has them."""
    made = []
    for package in ("vllm", "vllm.entrypoints", "vllm.entrypoints.openai"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for part, name in NAMES.items():
        kind = type(name, (SimpleNamespace,), {"to_beam_search_params": lambda self, *given: ("beams", *given)})
        for full in (f"vllm.entrypoints.openai.{part}", f"vllm.entrypoints.openai.{part}.protocol"):
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
        setattr(sys.modules[full], name, kind)
        made.append(kind)
    return made


def test_a_steered_beam_search_is_refused_by_name(requests):
    refuse_steered_beams()
    refuse_steered_beams()  # once is enough
    for kind in requests:
        assert kind(vllm_xargs=None).to_beam_search_params(9, {}) == ("beams", 9, {})
        assert kind(vllm_xargs={"other": 1}).to_beam_search_params(9) == ("beams", 9)
        with pytest.raises(ValueError, match=r"prm_alpha: vLLM's beam search keeps no extra arguments.*use_beam"):
            kind(vllm_xargs={"prm_alpha": 1.0}).to_beam_search_params(9)
        with pytest.raises(ValueError, match="prm_max_kl, prm_report"):
            kind(vllm_xargs={"prm_report": "x", "prm_max_kl": 1}).to_beam_search_params(9)


def test_without_a_server_nothing_is_imported(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vllm.entrypoints")]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    refuse_steered_beams()
    assert set(sys.modules) == before
