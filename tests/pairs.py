"""Tiny random models and tokenizers for tests of pairs, and naive computations to compare them with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "</s>"]
CORPUS = [
    "Step 1: add two and three to get five.\n\nStep 2: multiply five by four.\n\nThe answer is twenty.",
    "user\nassistant\nWhat is the sum of seven and eight? It is fifteen, since seven plus eight is fifteen.",
    "naïve café: 3 \u00d7 4 = 12, 5 + 6 = 11 \u2013 über",
]
OTHER_CORPUS = [
    "Therefore the result equals twelve; hence we conclude. Step by step: first add, then multiply.",
    CORPUS[0],
]


def byte_tokenizer(
    corpus: Sequence[str] = CORPUS,
    size: int = 340,
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    lines: bool = False,
    pattern: str | None = None,
    **given: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the GPT-2 kind; `lines` keeps line breaks together, as newer ones do.

    `pattern` says how a text is cut before merges.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if lines or pattern:
        breaks = pre_tokenizers.Split(Regex(pattern or "\n+|[^\n]+"), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([breaks, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    options = {"pad_token": "<pad>", "eos_token": eos, "additional_special_tokens": SPECIAL[1:3]} | given
    made = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **options)
    made.chat_template = template
    return made


def metaspace_tokenizer(corpus: Sequence[str] = OTHER_CORPUS, size: int = 420) -> PreTrainedTokenizerFast:
    """A tokenizer of the sentencepiece kind: a space before the first word, bytes for unknown characters."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    core.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    # Training marks the byte entries as special; a sentencepiece conversion does not.
    state = Tokenizer.from_str(_without_added(core.to_str()))
    state.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special[:3]])
    made = PreTrainedTokenizerFast(
        tokenizer_object=state, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    made.chat_template = PLAIN_CHAT
    return made


def _without_added(text: str) -> str:
    record = json.loads(text)
    record["added_tokens"] = []
    return json.dumps(record)


def llama(seed: int, vocab: int = 352, dtype: torch.dtype = torch.float32, **given: Any) -> LlamaForCausalLM:
    """A random Llama whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        | given
    )
    return LlamaForCausalLM(config).eval().to(dtype)


@torch.no_grad()
def naive_logprobs(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """log p of the response's tokens, the plain way: one forward, log_softmax, gather."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(ids).logits[0].float()
    table = torch.log_softmax(logits[:-1], dim=-1)
    return table.gather(1, ids[0, 1:, None])[:, 0].numpy()[len(prompt) - 1 :]


def naive_rewards(
    model: torch.nn.Module, reference: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], beta: float
) -> np.ndarray:
    return beta * (naive_logprobs(model, prompt, response) - naive_logprobs(reference, prompt, response))
