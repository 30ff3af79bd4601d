"""The engine on a GPU: the same promises as on a CPU, through the Triton ops. Run there by `pytest -m gpu`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig

import prm_search as ps
from prm_search.engine.kernel_layout import KernelLayout
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.layout import Unit

SHAPE = {
    "vocab_size": 997,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=24, query_pre_attn_scalar=64),
    "gpt_oss": lambda: GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=24),
}
# nats: an fp32 matmul of a GPU may run in tf32 inside transformers' own layers, which the full pass does too
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15}


def build(name: str, seed: int, dtype: torch.dtype, device: str):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.12)
    return model.to(device=device, dtype=dtype)


@torch.no_grad()
def full(model, ids: list[int], count: int) -> np.ndarray:
    """log p of the last `count` ids from one plain pass over all of them."""
    rows = torch.tensor([ids], device=model.device)
    logprobs = torch.log_softmax(model(rows).logits[0].float(), -1)
    return logprobs[:-1].gather(1, rows[0, 1:, None]).squeeze(1)[-count:].cpu().numpy()


def incremental_equals_full(name: str, dtype: torch.dtype, device: str) -> float:
    """Largest error over a forked tree whose paths do not all fit at once."""
    model = build(name, 0, dtype, device)
    lm = LanguageModel.of(model, capacity=200)
    rnd = random.Random(0)
    tips, worst = [lm.tree.root([rnd.randrange(997) for _ in range(40)])], 0.0
    for _ in range(4):
        tips = [lm.tree.fork(tip) for tip in tips[:4] for _ in range(3)]
        new = [[rnd.randrange(997) for _ in range(rnd.randint(1, 20))] for _ in tips]
        for tip, got in zip(tips, lm.extend(tips, new), strict=True):
            worst = max(worst, float(np.abs(got - full(model, tip.path_ids(), len(got))).max()))
    return worst


def search_scores_agree(device: str, dtype: torch.dtype) -> float:
    """Largest difference between a beam search's token rewards and a plain computation of them."""
    policy, prm = build("llama", 1, dtype, device), build("llama", 2, dtype, device)
    sampler = ps.HFPolicy(policy, _Ids(), stop_ids=[0])
    pair = ps.ImplicitPRM(prm, sampler, beta=1.0)
    results = ps.search(
        [[5, 6, 7, 8], [9, 10, 11]], policy=sampler, scorer=pair, strategy=ps.Beam(2, 3),
        steps=ps.StepRule(delimiter=None, max_tokens=7), max_new_tokens=21, temperature=1.0,
    )  # fmt: skip
    worst = 0.0
    for result in results:
        for node in result.tree.nodes[1:]:
            ids, count = [*result.tree.prompt_ids, *node.path_ids()], len(node.token_ids)
            want = full(prm, ids, count) - full(policy, ids, count)
            worst = max(worst, float(np.abs(node.token_rewards - want).max()))
    assert sampler.lm.tree.used == pair.prm.tree.used == 0
    return worst


class _Ids:
    """A tokenizer of numbers."""

    all_special_ids = (0,)
    eos_token_id = 0

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<{token_id}>"

    def encode(self, text: str, **kwargs: object) -> list[int]:
        return [1]

    def decode(self, ids: list[int], **kwargs: object) -> str:
        return "".join(f"<{i}>" for i in ids)


def test_the_checks_themselves_hold_on_a_cpu():
    assert incremental_equals_full("llama", torch.float32, "cpu") < 1e-4
    assert search_scores_agree("cpu", torch.float32) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_incremental_equals_full_on_a_gpu(name, dtype):
    assert incremental_equals_full(name, dtype, "cuda") < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_search_on_a_gpu_scores_what_a_plain_pass_does(dtype):
    assert search_scores_agree("cuda", dtype) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_gpu_takes_the_triton_path():
    lm = LanguageModel.of(build("llama", 3, torch.bfloat16, "cuda"))
    layout = lm._layout([Unit(np.arange(3), 1)])
    assert isinstance(layout, KernelLayout)
    root = lm.tree.root([1, 2, 3])
    before = torch.cuda.memory_allocated()
    lm.extend([root], [[4, 5]])
    branches = [lm.tree.fork(root) for _ in range(64)]
    held = torch.cuda.memory_allocated()
    assert held >= before
    lm.extend(branches, [[7]] * 64, want="log_softmax")
    assert lm.tree.used == 5 + 64
