"""The engine on the Triton ops, in Triton's interpreter: a process of its own, since the mode is set at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the triton extra is not installed")

SCRIPT = """
import random
import numpy as np, torch
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig
from prm_search.engine.language_model import LanguageModel

def naive(model, ids):
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return np.array([logprobs[i - 1, ids[i]].item() for i in range(1, len(ids))])

heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
shape = dict(vocab_size=97, hidden_size=32, intermediate_size=32, **heads)
for config in (
    LlamaConfig(**shape, num_hidden_layers=2),
    GptOssConfig(**shape, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    lm = LanguageModel(model, capacity=40, backend="triton")
    rnd = random.Random(0)
    ids = lambda n: [rnd.randrange(97) for _ in range(n)]
    root = lm.tree.root(ids(9))
    tips, worst = [root], 0.0
    with torch.no_grad():
        for _ in range(2):
            tips = [lm.tree.fork(tip) for tip in tips for _ in range(2)]
            new = [ids(rnd.randint(1, 5)) for _ in tips]
            for tip, got in zip(tips, lm.extend(tips, new)):
                want = naive(model, tip.path_ids())[-len(got):]
                worst = max(worst, float(np.abs(got - want).max()))
            rows = lm.extend(tips, [[]] * len(tips), want="log_softmax")
            lm.extend([lm.tree.fork(tips[0], at=5)], [ids(3)])
    assert worst < 1e-4, (config.model_type, worst)

    from prm_search.engine.graph_step import static_step
    from prm_search.triton_kernels import tiles
    static_step.LEAST_PATH, tiles.PREFIX_LEAST = 16, 8  # several tables, and prefixes that are read once
    root = lm.tree.root(ids(11))
    rows = [lm.tree.fork(root) for _ in range(3)] + [lm.tree.fork(lm.tree.root(ids(6)))]
    lm.extend(rows, [[]] * 4, want=None)
    lm.token_steps.set_mode("static")
    for turn in range(5):
        chosen = rows if turn != 3 else rows[1:]  # padding: 4 lines, then 3 of 4
        table = lm.extend(chosen, [ids(1) for _ in chosen], want="log_softmax")
        for row, got in zip(chosen, table):
            logits = model(torch.tensor([row.path_ids()])).logits[0, -1].float()
            worst = max(worst, (torch.log_softmax(logits, -1) - got).abs().max().item())
    assert worst < 1e-4, (config.model_type, "static", worst)
    assert lm.token_steps._step.copied > 0
    print(config.model_type, worst)
"""


def test_packed_forwards_through_the_kernels_are_exact():
    env = dict(os.environ, TRITON_INTERPRET="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["llama", "gpt_oss"]
