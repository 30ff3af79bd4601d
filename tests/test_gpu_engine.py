"""The engine on a GPU: the same promises as on a CPU, through the Triton ops. Run there by `pytest -m gpu`."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig

import prm_search as ps
from prm_search.engine.attention.kernel_layout import KernelLayout
from prm_search.engine.attention.layout import QueryRun
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.runner import layout_of

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

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<{token_id}>"

    def encode(self, text: str, **kwargs: object) -> list[int]:
        return [1]

    def decode(self, ids: list[int], **kwargs: object) -> str:
        return "".join(f"<{i}>" for i in ids)


def test_the_checks_themselves_hold_on_a_cpu():
    assert incremental_equals_full("llama", torch.float32, "cpu") < 1e-4
    assert search_scores_agree("cpu", torch.float32) < 1e-4
    module = build("llama", 0, torch.float32, "cpu")
    ours, theirs = (grown(served(module, mode, 300), 40, 0, 15) for mode in ("static", "packed"))
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-4


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
    layout = layout_of(lm.runner.run, [QueryRun(np.arange(3), 1)])
    assert isinstance(layout, KernelLayout)
    root = lm.tree.root([1, 2, 3])
    before = torch.cuda.memory_allocated()
    lm.extend([root], [[4, 5]])
    branches = [lm.tree.fork(root) for _ in range(64)]
    held = torch.cuda.memory_allocated()
    assert held >= before
    lm.extend(branches, [[7]] * 64, want="log_softmax")
    assert lm.tree.used == 5 + 64


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def served(module, mode: str, capacity: int = 2000) -> LanguageModel:
    lm = LanguageModel(module, None, capacity=capacity)
    lm.token_steps.set_mode(mode)
    return lm


def grown(lm: LanguageModel, prompt: int, seed: int, turns: int, rows: int = 5) -> list[torch.Tensor]:
    """Distributions after every step of a random tree: rows of siblings, forks, rows that pause, and evictions."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(997) for _ in range(n)]  # noqa: E731
    root = lm.tree.root(ids(prompt))
    tips = [lm.tree.fork(root) for _ in range(rows)]
    lm.extend(tips, [[]] * rows, want=None)
    tables = []
    for turn in range(turns):
        if turn % 9 == 8:
            tips[turn % rows] = lm.tree.fork(tips[(turn + 1) % rows])
        if turn % 11 == 10:
            others = [lm.tree.root(ids(100)) for _ in range(lm.tree.capacity // 100)]
            lm.extend(others, [[]] * len(others), want=None)  # evicts everything
            for other in others:
                lm.tree.release(other)
        chosen = tips if turn % 3 else tips[: rows - 2]
        tables.append(lm.extend(chosen, [ids(1) for _ in chosen], want="log_softmax").clone())
    return tables


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", [40, 500, 1100])  # within a table, over its edge, with a prefix read once
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_replay_has_the_bits_of_the_eager_step(name, prompt):
    config = CONFIGS[name]()
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval().to("cuda", torch.bfloat16)
    replayed, static = served(module, "graph", 1400), served(module, "static", 1400)
    ours, theirs = grown(replayed, prompt, 0, 60), grown(static, prompt, 0, 60)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert replayed.token_steps.graphs.replays > 10
    assert replayed.token_steps.graphs.refused is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_static_step_computes_what_a_packed_forward_does(dtype):
    module = build("llama", 0, dtype, "cuda")
    ours, theirs = (grown(served(module, mode, 200), 60, 1, 40) for mode in ("graph", "packed"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().mean() < TOLERANCE[dtype]


@pytest.mark.gpu
def test_graphs_follow_the_weights_and_the_pools():
    module = build("llama", 0, torch.bfloat16, "cuda")
    lm = served(module, "graph")
    grown(lm, 40, 0, 12)
    assert len(lm.token_steps.graphs) > 0
    with torch.no_grad():
        module.lm_head.weight.mul_(1.0)  # in place: the graphs read it where it is
        module.model.norm.weight = torch.nn.Parameter(2 * module.model.norm.weight)
    lm.tree = type(lm.tree)(lm.tree.capacity)  # nothing of the old weights is left
    lm.token_steps.refresh([])
    assert len(lm.token_steps.graphs) == 0
    ours = grown(lm, 40, 0, 12)
    theirs = grown(served(module, "static"), 40, 0, 12)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.gpu
def test_two_adapter_states_have_graphs_of_their_own():
    peft = pytest.importorskip("peft")
    module = build("llama", 0, torch.bfloat16, "cuda")
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=64))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    base = adapted.get_base_model()
    lms = [LanguageModel(base, state, capacity=2000) for state in (None, ("default",))]
    apart = []
    for mode in ("graph", "static"):
        for lm in lms:
            lm.token_steps.set_mode(mode)
        apart.append([grown(lm, 40, 0, 15) for lm in lms])
    for ours, theirs in zip(*apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(lm.token_steps.graphs.replays > 0 for lm in lms)
    assert not torch.equal(apart[0][0][-1], apart[0][1][-1])


@pytest.mark.gpu
def test_a_module_that_waits_runs_without_graphs(monkeypatch):
    module = build("llama", 0, torch.bfloat16, "cuda")
    mlp = module.model.layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x) if x.float().sum().item() != 0.5 else x)
    lm = served(module, "auto")
    with pytest.warns(RuntimeWarning, match="no CUDA graphs: its capture failed"):
        ours = grown(lm, 40, 0, 15)
    theirs = grown(served(module, "static"), 40, 0, 15)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().mean() < TOLERANCE[torch.bfloat16]
    assert lm.token_steps.choice(5, 60).way == "packed"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.isfinite(torch.rand(4, device="cuda")).all()
    other = served(build("llama", 1, torch.bfloat16, "cuda"), "graph")
    grown(other, 40, 0, 15)
    assert other.token_steps.graphs.replays > 0


@pytest.mark.gpu
def test_two_threads_capture_one_after_the_other():
    lms = [served(build("llama", seed, torch.bfloat16, "cuda"), "graph") for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        ours = list(threads.map(lambda lm: grown(lm, 40, 0, 30), lms))
    for lm, tables in zip(lms, ours, strict=True):
        theirs = grown(served(lm.module, "static"), 40, 0, 30)
        assert lm.token_steps.graphs.replays > 0
        assert all(torch.equal(a, b) for a, b in zip(tables, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["packed", "static", "graph"])
def test_nothing_is_waited_for_between_the_call_and_its_numbers(mode):
    lm = served(build("llama", 0, torch.bfloat16, "cuda"), mode)
    grown(lm, 40, 0, 15)  # compiles, captures
    root = lm.tree.root(list(range(3, 60)))
    lm.extend([root], [[]], want=None)
    tips = [[lm.tree.fork(root) for _ in range(5)] for _ in range(6)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = [lm.begin_extend(rows, [[i]] * 5, want="log_softmax") for i, rows in enumerate(tips, 3)]
        scored = lm.begin_score([lm.tree.fork(root, [3, 4, 5]) for _ in range(5)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for pending in begun:
        assert torch.isfinite(pending.result()).all()
    assert all(np.isfinite(values).all() for values in scored.result())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["packed", "auto"])
def test_streams_of_their_own_change_nothing(mode):
    modules = [build("llama", seed, torch.bfloat16, "cuda") for seed in (1, 2)]
    found = []
    for streams in (False, True):
        lms = [served(module, mode) for module in modules]
        for lm in lms:
            lm.own_stream(streams)
        pair = ps.ImplicitPRM(*lms, beta=1.0)
        sampler = ps.HFPolicy(lms[1], _Ids(), stop_ids=[])
        result = ps.search(
            [[5, 6, 7, 8]], policy=sampler, scorer=pair, strategy=ps.Steer(1.0, n=6), max_new_tokens=60, seed=0,
            steps=ps.StepRule(delimiter=None, max_tokens=12),
        )[0]  # fmt: skip
        found.append([(node.token_ids, node.token_rewards.tolist()) for node in result.tree.nodes[1:]])
    assert found[0] == found[1]


@pytest.mark.gpu
def test_the_head_of_a_decoding_keeps_its_accumulator():
    module = build("llama", 0, torch.bfloat16, "cuda")
    lm = served(module, "packed")
    hidden = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    want = torch.log_softmax(hidden.double() @ module.lm_head.weight.double().t(), -1)
    assert (lm.head.log_softmax(hidden).double() - want).abs().max() < 1e-4
