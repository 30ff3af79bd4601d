"""Adapter states of one module: shared weights, separate KV, switched for one forward and put back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, VOCABULARY, naive_logprobs, tiny
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from prm_search.engine.adapters import tuner_layers, unwrap
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.node_logprobs import node_logprobs
from prm_search.scorers.implicit.implicit_prm import ImplicitPRM
from prm_search.tree import Prompt, SearchTree

NATS = 1e-4
TEXT = [7, 21, 8, 55, 90, 3, 14, 14, 60, 33, 41, 12]


def with_lora(model: Any, seed: int = 0, name: str = "default", into: PeftModel | None = None) -> PeftModel:
    """LoRA layers whose effect is large."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=8)
    if into is None:
        into = get_peft_model(model, config, adapter_name=name)
    else:
        into.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in into.named_parameters():
            if "lora_" in key and f".{name}." in key:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return into.eval()


def said(lm: LanguageModel) -> np.ndarray:
    """TEXT in three uneven forked steps."""
    tip, values = None, []
    for part in (TEXT[:5], TEXT[5:6], TEXT[6:]):
        tip = lm.tree.root() if tip is None else lm.tree.fork(tip)
        values += lm.extend([tip], [part]) or []
    return np.concatenate(values)


def flags(model: Any) -> list[Any]:
    trained = [(name, weight.requires_grad) for name, weight in model.named_parameters()]
    return [(layer._disable_adapters, layer._active_adapter) for layer in tuner_layers(unwrap(model))] + trained


def test_a_pair_on_shared_weights_is_two_models() -> None:
    base = tiny("llama")
    alone = naive_logprobs(copy.deepcopy(base), TEXT)
    peft = with_lora(base)
    merged = with_lora(tiny("llama")).merge_and_unload()
    adapted = naive_logprobs(merged, TEXT)
    assert np.nanmax(np.abs(adapted - alone)) > 0.5
    model, reference = LanguageModel.of(peft), LanguageModel.of(peft, adapter=None)
    assert model.module is reference.module is base
    assert (model.state, reference.state) == (("default",), None)
    assert model.id != reference.id
    before = flags(peft)
    for _ in range(2):
        np.testing.assert_allclose(said(model), adapted, rtol=0, atol=NATS)
        np.testing.assert_allclose(said(reference), alone, rtol=0, atol=NATS)
    assert flags(peft) == before
    assert model.tree is not reference.tree
    assert model.pool.layers[0][0].data_ptr() != reference.pool.layers[0][0].data_ptr()
    assert model.tree.used == reference.tree.used == 2 * len(TEXT)


def test_interned_by_state() -> None:
    peft = with_lora(tiny("llama"))
    model, reference = LanguageModel.of(peft), LanguageModel.of(peft, adapter=None)
    assert LanguageModel.of(peft, adapter="default") is model
    assert LanguageModel.of(peft.get_base_model(), adapter=None) is reference
    assert LanguageModel.of(peft.get_base_model(), adapter="default") is model


def test_two_adapters() -> None:
    peft = with_lora(tiny("llama"), seed=1, name="one")
    with_lora(None, seed=2, name="two", into=peft)
    expected = {}
    for name in ("one", "two"):
        peft.set_adapter(name)
        expected[name] = naive_logprobs(peft, TEXT)
    assert np.nanmax(np.abs(expected["one"] - expected["two"])) > 0.5
    assert LanguageModel.of(peft).state == ("two",)  # the active one
    before = flags(peft)
    for name in ("one", "two", "one"):
        np.testing.assert_allclose(said(LanguageModel.of(peft, adapter=name)), expected[name], rtol=0, atol=NATS)
    assert flags(peft) == before


def test_plain_use_of_the_peft_model_is_untouched() -> None:
    peft = with_lora(tiny("llama"))
    inputs = {"input_ids": torch.tensor([TEXT]), "attention_mask": torch.ones(1, len(TEXT), dtype=torch.long)}
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    before = peft.generate(**inputs, **options)
    reference = LanguageModel.of(peft, adapter=None)
    model = LanguageModel.of(peft)
    said(reference)
    said(model)
    assert torch.equal(peft.generate(**inputs, **options), before)


def test_the_switch_is_put_back_after_a_failure() -> None:
    peft = with_lora(tiny("llama"))
    reference = LanguageModel.of(peft, adapter=None)
    before = flags(peft)
    inside = []

    def fail(*args: Any) -> None:
        inside.append(flags(peft))
        raise RuntimeError("stop")

    hook = peft.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        said(reference)
    hook.remove()
    assert inside != [before]
    assert flags(peft) == before


def test_disabled_adapters_are_still_those_that_were_asked_for() -> None:
    """`disable_adapter()` around a call is the caller's business with the PeftModel, not with the states of ours."""
    peft = with_lora(tiny("llama"))
    adapted = naive_logprobs(peft, TEXT)
    model = LanguageModel.of(peft)
    with peft.disable_adapter():
        np.testing.assert_allclose(said(model), adapted, rtol=0, atol=NATS)
        assert all(layer._disable_adapters for layer in tuner_layers(unwrap(peft)))


def test_merged_and_unloaded_is_a_plain_model() -> None:
    merged = with_lora(tiny("llama")).merge_and_unload()
    lm = LanguageModel.of(merged)
    assert lm.state is None
    np.testing.assert_allclose(said(lm), naive_logprobs(merged, TEXT), rtol=0, atol=NATS)


def test_merged_in_place() -> None:
    """The base weights then hold the adapter, so they cannot be run without it."""
    peft = with_lora(tiny("llama"), name="one")
    with_lora(None, seed=1, name="two", into=peft)
    peft.set_adapter("one")
    adapted = naive_logprobs(peft, TEXT)
    peft.merge_adapter(["one"])
    for adapter in (None, "two"):
        with pytest.raises(ValueError, match=r"adapters \['one'\] are merged into the base weights"):
            LanguageModel.of(peft, adapter=adapter)
    model = LanguageModel.of(peft)
    np.testing.assert_allclose(said(model), adapted, rtol=0, atol=NATS)
    peft.unmerge_adapter()
    np.testing.assert_allclose(said(model), adapted, rtol=0, atol=NATS)


def test_merged_in_place_later() -> None:
    peft = with_lora(tiny("llama"))
    lm = LanguageModel.of(peft, adapter=None)
    peft.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights"):
        said(lm)
    peft.unmerge_adapter()
    said(lm)


def test_a_bare_module_with_injected_adapters() -> None:
    peft = with_lora(tiny("llama"))
    with pytest.raises(ValueError, match=r"injected adapters \['default'\]: pass the PeftModel, or say which"):
        LanguageModel.of(peft.get_base_model())


def test_unknown_adapters() -> None:
    peft = with_lora(tiny("llama"))
    with pytest.raises(ValueError, match=r"adapter='other' is not loaded; the model has \['default'\]"):
        LanguageModel.of(peft, adapter="other")
    with pytest.raises(ValueError, match="adapter='other': the model has no adapters"):
        LanguageModel.of(tiny("llama"), adapter="other")


def test_virtual_tokens() -> None:
    peft = get_peft_model(tiny("llama"), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="adds virtual tokens"):
        LanguageModel.of(peft)


def test_adapters_injected_after_the_policy_was_made_do_not_change_it() -> None:
    """get_peft_model changes the module in place; the policy still means its base weights."""
    model = tiny("llama")
    lm = LanguageModel.of(model)
    trees = [SearchTree(Prompt(token_ids=tuple(TEXT[:5]))) for _ in range(2)]
    nodes = [tree.add(tree.root, TEXT[5:]) for tree in trees]
    before = node_logprobs(lm, nodes[:1])[0]
    pair = ImplicitPRM(with_lora(model), lm, beta=1.0)
    assert pair.reference is lm
    pair.score_nodes(nodes[1:])
    assert np.abs(node_logprobs(lm, nodes[1:])[0] - before).max() < NATS
    assert np.abs(nodes[1].token_rewards).max() > 0.01


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_activated_adapter_is_refused_by_name(wrapped: bool) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[7, 21])
    peft = get_peft_model(tiny("llama"), config).eval()
    model = torch.compile(peft) if wrapped else peft
    for adapter in ("auto", "default", None):
        with pytest.raises(ValueError, match=r"'default' is an activated LoRA \(alora_invocation_tokens\)"):
            LanguageModel.of(model, adapter=adapter)


def test_an_effect_in_the_wrapper_is_noticed() -> None:
    """Whatever PEFT method it is: a wrapper whose forward does more than pass on is refused, in that state alone."""
    peft = with_lora(tiny("llama"))
    inner = peft.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out

    peft.forward = forward  # type: ignore[method-assign]
    before = flags(peft)
    with pytest.raises(ValueError, match=r"adapters \['default'\] are not supported.*PeftModel.*nat without it"):
        LanguageModel.of(peft)
    assert flags(peft) == before
    assert LanguageModel.of(peft, adapter=None).state is None


def test_an_inactive_adapter_is_compared_in_its_own_state() -> None:
    peft = with_lora(tiny("llama"), seed=1, name="one")
    with_lora(None, seed=2, name="two", into=peft)
    assert peft.active_adapter == "one"
    LanguageModel.of(peft, adapter="two")
    assert peft.active_adapter == "one"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]])
def test_trained_embeddings_of_tied_weights(saved: list[str], tied: bool) -> None:
    """PEFT's wrapper of a head that is tied to a trained embedding passes on the latter's width as `out_features`."""
    sizes = FAMILIES["llama"]()
    sizes.tie_word_embeddings = True
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved, ensure_weight_tying=tied
    )
    peft = get_peft_model(tiny(sizes), config).eval()
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    lm = LanguageModel.of(peft)
    assert lm.head.vocab == VOCABULARY
    np.testing.assert_allclose(said(lm), naive_logprobs(peft, TEXT), rtol=0, atol=NATS)
