"""The hook under pipelines, PEFT, torch.compile, copies, pickles and saving."""

from __future__ import annotations

import copy
import pickle

import hf_models as hf
import pytest
import torch
from transformers import pipeline

import prm_search as ps

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES
ONE = ps.BestOfN(1)


def test_pipeline(model, tokenizer, guided):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    guidance = guided(ps.Beam(2, 2), seed=6)
    given = {"max_new_tokens": 8, "temperature": 0.7, "top_k": 0}
    batch = tokenizer("2+2=", return_tensors="pt")
    wanted = tokenizer.decode(model.generate(**batch, **given, prm_guidance=guidance)[0, 4:], skip_special_tokens=True)
    (found,) = pipe("2+2=", **given, return_full_text=False, prm_guidance=guidance)
    assert found["generated_text"] == wanted
    several = pipe(
        ["2+2=", "ab"], **given, num_return_sequences=2, return_full_text=False, return_dict_in_generate=True,
        prm_guidance=guidance,
    )  # fmt: skip
    assert [len(rows) for rows in several] == [2, 2]


def test_compiled(model, tokenizer, inputs, guided):
    compiled = torch.compile(model, backend="eager")
    guidance = guided(ps.Beam(2, 2), seed=6)
    wanted = model.generate(**inputs, max_new_tokens=6, prm_guidance=guidance)
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=6, prm_guidance=guidance), wanted)
    ps.disable(compiled)
    assert "generate" not in model.__dict__
    ps.enable(compiled, tokenizer)
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=6, prm_guidance=guidance), wanted)


def test_copies_answer_with_their_own_weights(model, inputs, guided, tokenizer):
    guidance = guided(ONE)
    given = {"max_new_tokens": 8, "do_sample": False}
    model.generate(**inputs, **given, prm_guidance=guidance)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.lm_head.weight.mul_(-1)
        mine = twin.generate(**inputs, **given, prm_guidance=guidance)
        assert torch.equal(mine, twin.generate(**inputs, **given))
        assert not torch.equal(mine, model.generate(**inputs, **given, prm_guidance=guidance))


def test_moving_and_casting(tokenizer, inputs):
    model = hf.llama(0)
    pair = ps.ImplicitPRM(hf.near(model, 1), model, tokenizer=tokenizer)
    ps.enable(model, tokenizer)
    guidance = ps.PRMGuidance(pair, strategy=ONE, steps=hf.STEPS)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to("cpu", dtype)
        pair.prm.module.to(dtype)
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        guided = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, prm_guidance=guidance
        )
        assert torch.equal(guided.sequences, plain)
        assert {pool.dtype for pools in pair.prm.pool.layers.values() for pool in pools} == {dtype}


def test_saving(model, inputs, guided, tmp_path):
    model.generate(**inputs, max_new_tokens=4, prm_guidance=guided(ps.BestOfN(2)))
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text() + (tmp_path / "generation_config.json").read_text()
    assert "LlamaForCausalLM" in saved
    assert "prm" not in saved
    again = type(model).from_pretrained(tmp_path)
    assert "generate" not in again.__dict__
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(again.generate(**inputs, max_new_tokens=6, do_sample=False), plain)


def test_a_generate_of_the_models_own_is_kept(pair_of, tokenizer, inputs, guided):
    model, _ = pair_of
    own = model.generate = lambda *args, **kwargs: "its own"
    try:
        ps.enable(model, tokenizer)
        assert model.generate(**inputs) == "its own"
        assert model.generate(**inputs, max_new_tokens=3, prm_guidance=guided(ONE)).shape[0] == 3
        ps.disable(model)
        assert model.generate is own
    finally:
        del model.generate


def test_enable_twice_and_disable(pair_of, tokenizer):
    model, _ = pair_of
    ps.enable(model, tokenizer)
    ps.enable(model, tokenizer)
    ps.disable(model)
    assert "generate" not in model.__dict__
    ps.disable(model)


def test_enable_what_it_is_not_for(pair_of, tokenizer):
    with pytest.raises(TypeError, match="generate"):
        ps.enable(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(TypeError, match="tokenizer"):
        ps.enable(pair_of[0], "gpt2")


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tokenizer):
    """A policy with a LoRA adapter, which is also the pair: its reference is the same model without the adapter."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    given = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(hf.llama(0), given).eval()
    ps.enable(wrapped, tokenizer)
    return wrapped, ps.ImplicitPRM(wrapped, tokenizer=tokenizer)


def test_peft_wrappers_search_with_the_adapter_that_is_on(lora, inputs):
    wrapped, pair = lora
    guidance = ps.PRMGuidance(pair, strategy=ONE, steps=hf.STEPS)
    given = {"max_new_tokens": 8, "do_sample": False}
    with_adapter = wrapped.generate(**inputs, **given)
    assert torch.equal(wrapped.generate(**inputs, **given, prm_guidance=guidance), with_adapter)
    with wrapped.disable_adapter():
        without = wrapped.generate(**inputs, **given)
        assert torch.equal(wrapped.generate(**inputs, **given, prm_guidance=guidance), without)
    assert not torch.equal(with_adapter, without)
    assert torch.equal(wrapped.generate(**inputs, **given), with_adapter)
    out = wrapped.generate(
        **inputs, max_new_tokens=8, num_return_sequences=2, return_dict_in_generate=True,
        prm_guidance=ps.PRMGuidance(pair, strategy=ps.Beam(2, 2), steps=hf.STEPS, seed=1),
    )  # fmt: skip
    assert out.prm[0].node.sampler == pair.prm.id  # one model in two states: the sampler is the trained half
    assert set(out.prm[0].usage.encoded_tokens) == {"policy", "reference"}


def test_peft_task_classes_and_the_bare_module(lora, inputs):
    wrapped, pair = lora
    guidance = ps.PRMGuidance(pair, strategy=ps.Beam(2, 2), steps=hf.STEPS, seed=1)
    given = {"max_new_tokens": 6, "prm_guidance": guidance}
    assert type(wrapped).__name__ == "PeftModelForCausalLM"
    wanted = wrapped.generate(**inputs, **given)
    assert torch.equal(wrapped.get_base_model().generate(**inputs, **given), wanted)
    custom = type(wrapped).generate(wrapped, **inputs, **given, do_sample=True, custom_generate=ps.generate)
    assert torch.equal(custom, wanted)


def test_several_adapters_at_once_are_refused(tokenizer, inputs, pair):
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(hf.llama(0), given).eval()
    wrapped.add_adapter("second", given)
    wrapped.base_model.set_adapter(["default", "second"])
    ps.enable(wrapped, tokenizer)
    with pytest.raises(ValueError, match=r"default.*second"):
        wrapped.generate(**inputs, max_new_tokens=4, prm_guidance=ps.PRMGuidance(pair, strategy=ONE))
