"""Static steps: they compute what packed forwards do, and a replay needs nothing but the static tensors."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCABULARY, naive_rows, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prm_search.engine.graph_step import cuda_graphs as graphs, static_step
from prm_search.engine.graph_step.cuda_graphs import CudaCapture, Graphs
from prm_search.engine.graph_step.slot_table import SlotTable, families
from prm_search.engine.language_model import LanguageModel
from prm_search.triton_kernels import reference, tiles

NATS = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow tables and short prefixes, so that paths of tens of tokens cross several edges."""
    monkeypatch.setattr(static_step, "LEAST_PATH", 16)
    monkeypatch.setattr(tiles, "PREFIX_LEAST", 8)
    monkeypatch.setattr(graphs, "USES", 2)


def served(model: Any, mode: str, capacity: int = 400) -> LanguageModel:
    lm = LanguageModel(model, None, capacity=capacity)
    lm.token_steps.set_mode(mode)  # type: ignore[arg-type]
    return lm


class Growth:
    """The same random tree grown in several LanguageModels, mostly by one token for each of some branches."""

    def __init__(self, lms: list[LanguageModel], seed: int) -> None:
        self.lms = lms
        self.draw = random.Random(seed)
        prompt = self.ids(self.draw.randint(9, 14))
        self.roots = [lm.tree.root() for lm in lms]
        for lm, root in zip(lms, self.roots, strict=True):
            lm.extend([root], [prompt], want=None)
        self.tips = [[lm.tree.fork(root)] for lm, root in zip(lms, self.roots, strict=True)]

    def ids(self, count: int) -> list[int]:
        return [self.draw.randrange(3, VOCABULARY) for _ in range(count)]

    def fork(self) -> None:
        """Two or three children of one tip."""
        at, count = self.draw.randrange(len(self.tips[0])), self.draw.randint(2, 3)
        for lm, tips in zip(self.lms, self.tips, strict=True):
            tips += [lm.tree.fork(tips[at]) for _ in range(count)]

    def step(self) -> list[torch.Tensor]:
        """One token for each of some tips; the distributions after them, by LanguageModel."""
        count = len(self.tips[0])
        chosen = sorted(self.draw.sample(range(count), self.draw.randint(1, min(count, 7))))
        new = [self.ids(1) for _ in chosen]
        return [
            lm.extend([tips[i] for i in chosen], new, want="log_softmax")  # type: ignore[misc]
            for lm, tips in zip(self.lms, self.tips, strict=True)
        ]

    def evict(self) -> None:
        """Something else takes all the slots that are not in use just now."""
        for lm in self.lms:
            other = lm.tree.root()
            lm.extend([other], [self.ids(1) * lm.tree.capacity], want=None)
            lm.tree.release(other)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_a_static_step_computes_what_a_packed_forward_does(name: str, seed: int) -> None:
    model = tiny(name)
    static, plain = served(model, "static", 90), served(model, "packed", 90)
    growth = Growth([static, plain], seed)
    for turn in range(16):
        if turn % 5 == 0:
            growth.fork()
        if turn % 7 == 6:
            growth.evict()
        ours, theirs = growth.step()
        assert (ours - theirs).abs().max() < NATS
    assert static.forwards == plain.forwards
    assert static.token_steps._step.copied > 0 == plain.token_steps._step.copied


class Tape(TorchDispatchMode):
    """A CUDA graph in torch ops: what was launched, to be launched again on the same addresses, and nothing else.

    Every number that the host put into a launch is baked in, as in a graph; asking a tensor for one is refused.
    """

    def __init__(self, work: Callable[[], None], _: torch.device) -> None:
        super().__init__()
        self.launches: list[tuple[Any, Any, Any, Any]] = []
        with self:
            work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.launches.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.launches:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LanguageModel]:
    """LanguageModels on a CPU that replay tapes as they would graphs on a GPU."""

    def write(k_pool: Any, v_pool: Any, k_new: Any, v_new: Any, slots: Any) -> None:
        reference._write_kept(k_pool, v_pool, k_new, v_new, slots >= 0, slots.long())

    def make(model: Any, capacity: int = 400, capture: Any = Tape) -> LanguageModel:
        lm = LanguageModel(model, None, capacity=capacity)
        steps = lm.token_steps
        steps.graphs = Graphs(capture)
        steps._why_not, steps.mode = "", "graph"
        monkeypatch.setattr(steps, "_obstacle", lambda: steps.graphs.refused)
        return lm

    monkeypatch.setattr(reference, "write_kv", write)  # without the CPU's look at the slots
    return make


@pytest.mark.parametrize("seed", range(3))
def test_replays_read_static_tensors_only(model: Any, seed: int, taped: Callable[..., LanguageModel]) -> None:
    """Growing over the edges of buckets, forks, padding, evictions between steps: a replay is still the step."""
    replayed, static = taped(model, 90), served(model, "static", 90)
    growth = Growth([replayed, static], seed)
    for turn in range(45):
        if turn % 20 == 0:
            growth.fork()
        if turn % 7 == 6:
            growth.evict()
        ours, theirs = growth.step()
        assert torch.equal(ours, theirs)
    assert replayed.token_steps.graphs.refused is None
    assert replayed.token_steps.graphs.replays > 4


def decode(lm: LanguageModel, branches: list[Any], tokens: int, seed: int = 0) -> list[torch.Tensor]:
    draw = random.Random(seed)
    new = [[[draw.randrange(3, VOCABULARY)] for _ in branches] for _ in range(tokens)]
    return [lm.extend(branches, ids, want="log_softmax") for ids in new]  # type: ignore[misc]


def begin(lm: LanguageModel, rows: int, prompt: int = 12) -> list[Any]:
    root = lm.tree.root(list(range(3, 3 + prompt)))
    branches = [lm.tree.fork(root) for _ in range(rows)]
    lm.extend(branches, [[]] * rows, want=None)
    return branches


def test_a_row_that_goes_on_is_appended_to(model: Any) -> None:
    """A step of rows that were in the last one copies no path again."""
    lm = served(model, "static")
    branches = begin(lm, 5)
    header = len(static_step._FIELDS) * static_step._SPAN
    copied = []
    for _ in range(6):
        before = lm.token_steps._step.copied
        decode(lm, branches, 1)
        copied.append(lm.token_steps._step.copied - before)
    assert copied == [header + 5 * (1 + 16), header, header, header, header + 5 * (1 + 32), header]  # 16 slots, then 32
    lm.tree.release(branches[2])
    before = lm.token_steps._step.copied
    decode(lm, [*branches[:2], *branches[3:]], 1)
    assert lm.token_steps._step.copied - before == header + 1 + 32  # one stands beyond the four lines of this shape


def test_moved_weights_and_pools_drop_the_graphs(model: Any, taped: Callable[..., LanguageModel]) -> None:
    lm = taped(model)
    steps = lm.token_steps
    branches = begin(lm, 4)
    decode(lm, branches, 3)
    steps.refresh([])
    decode(lm, branches, 3)
    assert len(steps.graphs) == 1
    steps.refresh([])  # nothing has changed
    assert len(steps.graphs) == 1
    kept, model.model.norm.weight = model.model.norm.weight, torch.nn.Parameter(2 * model.model.norm.weight.data)
    steps.refresh([])
    assert len(steps.graphs) == 0
    for branch in branches:
        lm.tree.release(branch)
    table = decode(lm, branches := begin(lm, 4), 4)[-1]
    assert len(steps.graphs) == 1
    want = naive_rows(model, branches[0].path_ids())[-1]
    np.testing.assert_allclose(table[0].numpy(), want, rtol=0, atol=NATS)
    model.model.norm.weight = kept
    lm.pool.layers = {layer: (k.clone(), v.clone()) for layer, (k, v) in lm.pool.layers.items()}  # they have moved
    steps.refresh([])
    lm2 = served(model, "packed")
    for branch in branches:
        lm.tree.release(branch)
    branches = begin(lm, 4)
    assert (decode(lm, branches, 4)[-1] - decode(lm2, begin(lm2, 4), 4)[-1]).abs().max() < NATS
    assert len(steps.graphs) == 1
    steps.forget()
    assert len(steps.graphs) == 0


def test_graphs_are_few_and_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """None outlives another of its stream, and none goes while the device may still replay it."""
    monkeypatch.setattr(graphs, "KEPT", 2)
    out, made, waits = torch.zeros(2), [], []

    def capture(work: Callable[[], None], device: torch.device) -> Tape:
        made.append(work)
        return Tape(work, device)

    kept = Graphs(capture, lambda device: waits.append((device.type, len(kept), len(made))))
    for key in (1, 2, 1, 3, 1, 2):
        for _ in range(4):
            kept.run(key, lambda key=key: out.fill_(key), lambda: out)
            assert out.tolist() == [key, key]
    assert [kept.has(key) for key in (1, 2, 3)] == [False, True, False]
    assert len(made) == 5  # 1 and 2; 3, for which both go; 1; 2, for which 3 and 1 go
    assert waits == [("cpu", 2, 2), ("cpu", 2, 4)]


def test_a_module_that_waits_for_the_device_is_told_once(
    model: Any, monkeypatch: pytest.MonkeyPatch, taped: Callable[..., LanguageModel]
) -> None:
    forward = model.model.layers[1].mlp.forward
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: forward(x) if x.sum().item() != 0.5 else x)
    lm, plain = taped(model), served(model, "packed")
    steps = lm.token_steps
    steps.mode = "auto"
    monkeypatch.setattr(type(lm.runner.run), "on_gpu", True)
    branches = begin(lm, 3)
    with pytest.warns(RuntimeWarning, match="no CUDA graphs: its capture failed: RuntimeError: operation not"):
        ours = decode(lm, branches, 6)
    theirs = decode(plain, begin(plain, 3), 6)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < NATS
    assert steps.choice(3, 20).way == "packed"
    assert "capture failed" in steps.choice(3, 20).reason
    steps.forget()
    steps.mode = "graph"
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="stepping='graph' is impossible: its capture"):
        decode(lm, branches, 6)


def test_a_replay_that_differs_is_not_used(
    model: Any, monkeypatch: pytest.MonkeyPatch, taped: Callable[..., LanguageModel]
) -> None:
    class Wrong(Tape):
        def replay(self) -> None:
            super().replay()
            self.launches[-1][1][0].add_(1.0)

    lm, plain = taped(model, capture=Wrong), served(model, "packed")
    lm.token_steps.mode = "auto"
    monkeypatch.setattr(type(lm.runner.run), "on_gpu", True)
    with pytest.warns(RuntimeWarning, match="a replay gave other numbers than the eager step"):
        ours = decode(lm, begin(lm, 3), 5)
    theirs = decode(plain, begin(plain, 3), 5)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < NATS


def test_a_step_of_nan_is_the_same_nan_again(model: Any, taped: Callable[..., LanguageModel]) -> None:
    """One bad request at the time of a capture costs the others no graphs."""
    lm = taped(model)
    branches = begin(lm, 3)
    weight = model.model.embed_tokens.weight
    kept = weight.data[7].clone()
    weight.data[7] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="not numbers"):
            lm.extend(branches, [[5], [7], [6]], want="log_softmax")
    weight.data[7] = kept
    assert lm.token_steps.graphs.refused is None
    before = lm.token_steps.graphs.replays
    ours, theirs = decode(lm, branches, 3), decode(plain := served(model, "packed"), begin(plain, 3), 3)
    assert lm.token_steps.graphs.replays == before + 3
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < NATS


class FakeCuda:
    """What a capture asks torch for, with what torch does where the end of a capture raises."""

    def __init__(self) -> None:
        self.current: Any = "the caller's"
        self.capturing = self.pools = 0
        self.seen: list[tuple[str, Any]] = []
        self.default_generators = {0: self}

    def clone_state(self) -> str:
        return "a state"

    def graphsafe_set_state(self, state: str) -> None:
        self.seen.append(("random numbers", state))

    def Stream(self, device: Any) -> Any:
        return SimpleNamespace(device=device, wait_stream=lambda _: None)

    def CUDAGraph(self) -> Any:
        return type("CUDAGraph", (), {})()

    def current_stream(self) -> Any:
        return SimpleNamespace(name=self.current, wait_stream=lambda _: None)

    def set_stream(self, stream: Any) -> None:
        self.current = stream.name

    def device(self, device: Any) -> Any:
        return nullcontext()

    stream = device

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert not self.capturing, "one capture at a time in a process"
        self.capturing += 1
        self.seen.append(("pool", pool))
        before, self.current = self.current, "the capture's"
        try:
            yield
            self.current = before
        finally:
            self.capturing -= 1


def test_captures_take_turns_and_leave_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    one, other, device = CudaCapture(), CudaCapture(), torch.device("cuda", 0)
    kept: list[Any] = []
    threads = [
        threading.Thread(target=lambda c=c: kept.append(c(lambda: time.sleep(0.02), device))) for c in (one, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 2
    pools = cuda.pools
    kept.append(one(lambda: None, device))
    assert cuda.pools == pools == 2  # the one it had
    kept.clear()
    gc.collect()
    kept.append(one(lambda: None, device))
    assert cuda.seen.pop() == ("pool", pools + 1)  # the old one went with its last graph

    def fail() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        one(fail, device)
    assert cuda.current == "the caller's"
    assert cuda.seen.pop() == ("random numbers", "a state")
    kept.append(one(lambda: None, device))
    assert cuda.seen.pop() == ("pool", pools + 2)


def test_what_is_known_to_be_impossible_is_refused_by_rule(model: Any) -> None:
    for name, why in {"mixtral": "experts are run one by one", "llama": None, "qwen2-moe": "experts"}.items():
        found = graphs.obstacle_in(tiny_eager(name))
        assert (found is None) if why is None else (why in found)
    moe = tiny_eager("mixtral")
    moe.set_experts_implementation("grouped_mm")
    assert graphs.obstacle_in(moe) is None
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "model.layers.0 has forward hooks" in str(graphs.obstacle_in(model))
    hook.remove()
    model.config.rope_parameters["rope_type"] = "dynamic"
    assert "dynamic rotary frequencies" in str(graphs.obstacle_in(model))
    model.config.rope_parameters["rope_type"] = "default"
    lm = served(model, "auto")
    assert lm.token_steps.choice(4, 100).way == "packed"
    assert "cpu" in lm.token_steps.choice(4, 100).reason
    with pytest.raises(ValueError, match=r"stepping='graph' is impossible: .*cpu"):
        lm.token_steps.set_mode("graph")
    with pytest.raises(ValueError, match="stepping='fast'; allowed are 'auto', 'packed', 'static', 'graph'"):
        lm.token_steps.set_mode("fast")  # type: ignore[arg-type]


def tiny_eager(name: str) -> Any:
    model = tiny(name)
    if hasattr(model, "set_experts_implementation") and name != "llama":
        model.set_experts_implementation("eager")
    return model


def test_lines_and_families() -> None:
    lm = served(tiny("llama"), "static")
    parents = [lm.tree.root(list(range(3, 13 + i))) for i in range(3)]
    lm.extend(parents, [[]] * 3, want=None)
    a, b, c = ([lm.tree.fork(parent) for _ in range(3)] for parent in parents)

    def grow(branches: list[Any]) -> list[Any]:
        lm.extend(branches, [[5]] * len(branches), want=None)
        return branches

    lines = SlotTable(16)
    first = grow([a[0], b[0], a[1], b[1]])
    at, dirty = lines.assign(first, 8, shares_prefixes=True)
    assert sorted(at.tolist()) == [0, 1, 2, 3]
    assert dirty == [0, 1, 2, 3]
    starts, shared = families(first, at, 4)  # type: ignore[misc]
    assert sorted(starts.tolist()) == [0, 2]
    assert shared.tolist() == [10, 11, 10, 11]
    second = grow([a[1], b[1], c[0], c[1]])  # those who stay keep their lines
    again, dirty = lines.assign(second, 8, shares_prefixes=True)
    assert again[:2].tolist() == at[2:].tolist()
    assert dirty == [2, 3]
    assert families(second, again, 1) is None
    alone = families([c[0]], np.array([5]), 4)
    assert alone is not None
    assert [part.tolist() for part in alone] == [[0, 5], [0]]
    mixed = grow([c[0], a[2], c[1], a[0], c[2], a[1]])
    scattered = SlotTable(16)
    scattered.assign(mixed, 8, shares_prefixes=False)
    apart = grow(mixed)
    packed, _ = scattered.assign(apart, 8, shares_prefixes=True)
    assert len(families(apart, packed, 8)[0]) == 2  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_static_step_compiles_to_one_graph(name: str) -> None:
    """torch.compile takes in the whole forward, our attention included, and nothing makes it compile again."""
    model = tiny(name)
    lm = served(model, "static")
    plain = decode(lm, begin(lm, 4, prompt=18), 4)
    branches = begin(lm, 4, prompt=18)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.base_model.compile(backend="aot_eager", fullgraph=True)
    compiled = decode(lm, branches, 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours - theirs).abs().max() < NATS
