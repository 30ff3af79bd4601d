"""integrations/custom_generate: the folder that transformers loads a decoding method from."""

from __future__ import annotations

from pathlib import Path

import hf_models as hf
import pytest
import torch

import prm_search as ps

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES

FOLDER = str(Path(__file__).resolve().parents[1] / "integrations" / "custom_generate")


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path, monkeypatch):
    """transformers copies what it loads into a folder of modules: one of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_the_folder_decodes_as_the_function_does(pair_of, inputs, guided):
    model, _ = pair_of
    given = {**inputs, "max_new_tokens": 9, "top_k": 0, "prm_guidance": guided(ps.Beam(2, 2), seed=2)}
    expected = model.generate(**given, do_sample=True, custom_generate=ps.generate)
    assert torch.equal(model.generate(**given, custom_generate=FOLDER, trust_remote_code=True), expected)


def test_remote_code_is_not_run_unasked(pair_of, inputs, guided):
    with pytest.raises(ValueError, match="trust_remote_code"):
        pair_of[0].generate(
            **inputs, max_new_tokens=9, custom_generate=FOLDER, trust_remote_code=False, prm_guidance=guided()
        )


def test_an_explicit_do_sample_false_is_refused(pair_of, inputs, guided):
    with pytest.raises(ValueError, match="do_sample"):
        pair_of[0].generate(
            **inputs, max_new_tokens=9, do_sample=False, custom_generate=FOLDER, trust_remote_code=True,
            prm_guidance=guided(ps.Beam(2, 2)),
        )  # fmt: skip


def test_a_call_without_guidance_says_so(pair_of, inputs):
    with pytest.raises(TypeError, match="prm_guidance"):
        pair_of[0].generate(**inputs, max_new_tokens=9, custom_generate=FOLDER, trust_remote_code=True)
