"""Admission: what is not served exactly is refused by name, and asking changes nothing."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import FAMILIES, VOCABULARY, draw_weights, naive_logprobs, tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prm_search.engine.admission import check as admission, miniature
from prm_search.engine.attention import hook as attention
from prm_search.engine.attention.layout import ScoreModifiers
from prm_search.engine.head import Head
from prm_search.engine.language_model import LanguageModel

NATS = 1e-4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_verdicts", {})


def built(kind: str, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny(getattr(transformers, kind)(**{**SIZES, **fields}))


# --- refused by name -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "positions inside the attention": (
        lambda: built("BloomConfig", n_layer=2, n_head=4),
        "bloom .*its attention does not go through transformers' attention interface",
    ),
    "rotary attention of its own": (
        lambda: built("GPTNeoXJapaneseConfig", intermediate_multiple_size=2),
        "gpt_neox_japanese .*its attention does not go through transformers' attention interface",
    ),
    "recurrent": (
        lambda: built("MambaConfig", state_size=4),
        "mamba .*keeps a state beside keys and values",
    ),
    "half recurrent": (
        lambda: built("Qwen3NextConfig", num_experts=4, num_experts_per_tok=2, head_dim=8),
        "qwen3_next .*keeps a state beside keys and values",
    ),
    "short convolutions": (
        lambda: built("Lfm2Config", layer_types=["conv", "full_attention"]),
        "lfm2 .*layers of kind conv|lfm2 .*keeps a state beside",
    ),
    "sees what follows": (
        lambda: built("BertConfig", type_vocab_size=2),
        "bert .*not a causal model",
    ),
    "attends to chunks, which show after 8192 tokens": (
        lambda: built(
            "Llama4TextConfig", num_hidden_layers=4, num_local_experts=2, intermediate_size_mlp=48, head_dim=8,
            attention_chunk_size=8192,
        ),
        "llama4_text .*layers of kind chunked_attention",
    ),
    "keeps the best 2048 tokens": (
        lambda: built("DogeConfig", keep_window_size=2048),
        "doge .*log-probs differ by",
    ),
    "a head of several layers": (
        lambda: built("ModernBertDecoderConfig"),
        "modernbert-decoder .*its head does more than a matrix product",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        LanguageModel.of(make())


# --- served as far as it is exact ----------------------------------------------------------------------------------

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (lambda: built("LlamaConfig", max_position_embeddings=40, rope_parameters=DYNAMIC), 39),
        (
            lambda: built(
                "Phi3Config", max_position_embeddings=160, original_max_position_embeddings=40, rope_parameters=LONGROPE
            ),
            40,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_depend_on_the_length(model: Callable[[], Any], longest: int) -> None:
    """A token's log-prob would change with the text after it beyond that length: no incremental score can follow."""
    module = model()
    lm = LanguageModel.of(module)
    assert lm.context == longest
    text = np.random.default_rng(0).integers(3, VOCABULARY, longest + 60).tolist()
    beyond = naive_logprobs(module, text)  # leaves the module with frequencies of a long text
    assert np.nanmax(np.abs(beyond[:longest] - naive_logprobs(module, text[:longest]))) > 1e-3
    naive_logprobs(module, text)
    root = lm.tree.root()
    said = np.concatenate(
        [lm.extend([root], [text[:11]])[0], lm.extend([lm.tree.fork(root)], [text[11:longest]])[0]]  # type: ignore[index]
    )
    np.testing.assert_allclose(said, naive_logprobs(module, text[:longest]), rtol=0, atol=NATS)
    with pytest.raises(ValueError, match=f"path of {longest + 1} tokens exceeds the model's context of {longest}"):
        lm.extend([lm.tree.root()], [text[: longest + 1]])


# --- faults are seen -----------------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, **lost: Any) -> None:
    def scores(scale: float, softcap: Any, window: Any, sinks: Any, *more: Any) -> ScoreModifiers:
        given = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
        change = {name: value(given[name]) if callable(value) else value for name, value in lost.items()}
        return ScoreModifiers(*{**given, **change}.values(), *more)

    monkeypatch.setattr(attention, "ScoreModifiers", scores)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("mistral-window", {"window": None}),
        ("mistral-window", {"window": lambda w: w + 1}),
        ("gemma3", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt-oss", {"sinks": None}),
        ("granite", {"scale": lambda s: 1.01 * s}),
        ("llama", {"scale": lambda s: 1.001 * s}),
    ],
)
def test_a_fault_in_attention_is_seen(family: str, lost: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    if hasattr(model.config, "sliding_window") and model.config.sliding_window:
        model.config.sliding_window = 4096  # which no short test of the model itself would cross
    broken(monkeypatch, **lost)
    with pytest.raises(ValueError, match=r"log-probs differ by \S+ nat after forks"):
        LanguageModel.of(model)


@pytest.mark.parametrize(("family", "part"), [("cohere", "scale"), ("granite", "scale"), ("gemma2", "softcap")])
def test_a_fault_in_the_head_is_seen(family: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Head.__init__

    def broken_head(self: Head, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        setattr(self, part, {"scale": 1.0, "softcap": None}[part])

    monkeypatch.setattr(Head, "__init__", broken_head)
    with pytest.raises(ValueError, match="its head does more than a matrix product"):
        LanguageModel.of(tiny(family))


def test_a_module_unlike_its_family_is_seen() -> None:
    """Something done to this very module that a miniature of its config does not have."""
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(lambda module, args, out: out + out.roll(1, dims=1))
    with pytest.raises(ValueError, match=r"this model's packed forward is off by \S+ nat on average"):
        LanguageModel.of(model)


def test_a_module_that_gives_no_numbers_is_seen() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"not numbers|off by inf nat"):
        LanguageModel.of(model)


def test_a_module_whose_forward_fails() -> None:
    model = tiny("llama")

    def fail(*args: Any) -> None:
        raise RuntimeError("no such device")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="its forward fails: RuntimeError: no such device"):
        LanguageModel.of(model)


# --- served as they are: dtypes, quantisation, devices --------------------------------------------------------------


class Int8Linear(nn.Module):
    """Weights in int8 with a scale a row, as quantisation back ends keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def check_some(model: Any, nats: float) -> None:
    lm = LanguageModel.of(model)
    text = np.random.default_rng(0).integers(3, VOCABULARY, 30).tolist()
    root = lm.tree.root()
    lm.extend([root], [text[:13]])
    said = lm.extend([lm.tree.fork(root)], [text[13:]])
    assert np.abs(said[0] - naive_logprobs(model, text)[13:]).mean() < nats  # type: ignore[index]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "deepseek-v3"])
def test_bf16(family: str) -> None:
    check_some(tiny(family).bfloat16(), 0.15)


def test_quantised() -> None:
    model = tiny("llama")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    model.config.quantization_config = {"quant_method": "int8-of-this-test"}
    check_some(model, NATS)


def test_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    check_some(model, NATS)


def test_a_head_with_a_bias() -> None:
    model = built("PhiConfig")
    assert model.lm_head.bias is not None
    check_some(model, NATS)


# --- asking changes nothing ----------------------------------------------------------------------------------------


def test_the_model_and_the_random_numbers_are_left_alone() -> None:
    model = tiny("gemma3")
    config, weights = model.config.to_dict(), copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    torch.manual_seed(11)
    np.random.seed(11)
    state, verbosity = torch.get_rng_state(), transformers.logging.get_verbosity()
    LanguageModel.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert transformers.logging.get_verbosity() == verbosity
    assert json.dumps(model.config.to_dict(), default=str) == json.dumps(config, default=str)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    after = model.generate(ids, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))


def test_a_family_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = miniature.build
    monkeypatch.setattr(miniature, "build", lambda *args: (made.append(args), build(*args))[1])
    for seed in range(3):
        LanguageModel.of(tiny("llama", seed=seed).to(torch.bfloat16 if seed else torch.float32))
    assert len(made) == 1
    LanguageModel.of(tiny("qwen2"))
    wide = FAMILIES["llama"]()
    wide.num_hidden_layers = 3
    LanguageModel.of(tiny(wide))
    assert len(made) == 3


def test_bytes_of_kv_set_the_capacity() -> None:
    model = tiny("deepseek-v3")
    width = 2 * 4 * 4 * (16 + 8 + 12)  # layers, fp32, heads, k and v
    assert admission.check(model, None, LanguageModel) == width
    assert LanguageModel.of(model).tree.capacity == min(1 << 20, (4 << 30) // width)


# --- where no miniature can be made --------------------------------------------------------------------------------


class Picky(LlamaForCausalLM):
    """Remote code whose constructor wants more than a config."""

    def __init__(self, config: LlamaConfig, extra: int) -> None:
        super().__init__(config)


def picky(**fields: Any) -> Picky:
    torch.manual_seed(0)
    model = Picky(LlamaConfig(**{**SIZES, **fields}), 3).eval()
    draw_weights(model)
    return model


def test_a_small_model_is_checked_itself() -> None:
    check_some(picky(), NATS)
    check_some(picky().bfloat16(), 0.15)


def test_a_small_model_is_refused_on_its_own_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, scale=lambda s: 1.001 * s)
    with pytest.raises(ValueError, match="log-probs differ"):
        LanguageModel.of(picky())


def test_a_large_model_that_cannot_be_made_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "LARGEST_COPY", 1000)
    with pytest.raises(ValueError, match=r"no small copy of it could be made to check it on \(TypeError: .*extra"):
        LanguageModel.of(picky())


# --- miniatures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["MistralConfig", "Gemma3TextConfig", "GptOssConfig", "DeepseekV3Config", "Llama4TextConfig"]
)
def test_a_miniature_keeps_the_kind(kind: str) -> None:
    config = getattr(transformers, kind)()
    before = json.dumps(config.to_dict(), default=str)
    small = miniature.shrink(config)
    assert json.dumps(config.to_dict(), default=str) == before
    assert type(small) is type(config)
    assert all(length <= 16 for length in miniature.limits(small))
    for name in ("sliding_window", "attention_chunk_size", "tie_word_embeddings", "hidden_act"):
        given, kept = getattr(config, name, None), getattr(small, name, None)
        assert kept == given or (isinstance(given, int) and isinstance(kept, int) and 8 <= kept <= 16)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        assert len(small.layer_types) == small.num_hidden_layers < config.num_hidden_layers
        assert set(small.layer_types) == set(kinds)
    grouped = config.num_attention_heads > config.num_key_value_heads
    assert (small.num_attention_heads > small.num_key_value_heads) == grouped
    size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(small).parameters())
    assert size < 400_000


def test_a_miniature_shrinks_what_its_layers_do_each_for_themselves() -> None:
    small = miniature.shrink(transformers.Gemma4TextConfig())
    assert small.num_hidden_layers == 2
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.head_dim for layer in small.per_layer_config] == [16, 32]
