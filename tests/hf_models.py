"""Tiny random transformers models with a byte-level tokenizer, for the tests of the generate hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import exact
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prm_search as ps

PAD, EOS = 0, 1
VOCAB = 258
STEPS = ps.StepRule(delimiter="\n", max_tokens=4)


def tokenizer(reverse: bool = False) -> PreTrainedTokenizerFast:
    """Bytes behind <pad> and <eos>, in another order where reversed; pads on the left."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocab = {"<pad>": PAD, "<eos>": EOS, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def config(**given: Any) -> LlamaConfig:
    return LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, **given,
    })  # fmt: skip


def llama(seed: int = 0, **given: Any) -> LlamaForCausalLM:
    """A model with strong random weights, so that its distributions are far from flat."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**given)).eval()


def near(model: LlamaForCausalLM, seed: int, scale: float = 0.02) -> LlamaForCausalLM:
    """Another model whose weights are the model's plus a little noise, as training would leave it."""
    twin = llama(seed)
    if model.dtype == torch.float64:
        exact(twin)
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return twin


def responses(sequences: torch.Tensor, inputs: Any) -> list[list[int]]:
    """Response tokens of each row, without padding."""
    return [[i for i in row if i != PAD] for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer():
    return tokenizer()


@pytest.fixture(scope="module")
def pair_of(tokenizer):
    """A model and a pair whose reference is that model."""
    model = exact(llama(0))
    return model, ps.ImplicitPRM(near(model, 1), model, tokenizer=tokenizer, beta=0.1)


@pytest.fixture
def model(pair_of, tokenizer):
    """The model, enabled."""
    ps.enable(pair_of[0], tokenizer)
    yield pair_of[0]
    ps.disable(pair_of[0])


@pytest.fixture
def pair(pair_of):
    return pair_of[1]


@pytest.fixture
def guided(pair):
    """Makes PRMGuidance with the pair and short steps."""
    return lambda strategy="beam", **given: ps.PRMGuidance(pair, **{"strategy": strategy, "steps": STEPS, **given})


@pytest.fixture(scope="module")
def inputs(tokenizer):
    """Three prompts of unequal length."""
    return tokenizer(["2+2=", "hello there, ", "a"], return_tensors="pt", padding=True)


FIXTURES = (_tokenizer, pair_of, model, pair, guided, inputs)
