"""CUDA graphs of static steps: captured once a shape, replayed after that, and given up where something has moved."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from ..adapters import device_of

KEPT = 24  # graphs of one model at most: one more, and all of them go
USES = 3  # steps of a shape before it is captured: a shape that comes once is not worth it

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_STATIC_EXPERTS = ("grouped_mm", "batched_mm")  # transformers' implementations whose launches no routing changes

_capturing = threading.Lock()  # torch allows one capture at a time in a process
_spoilt: list[Any] = []  # graphs whose capture failed: torch's allocator asks them in later captures, so they stay


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None: ...


class Graphs:
    """The graphs of one LanguageModel, that is of one module in one adapter state.

    A graph is used only after its first replay has given the bits of the eager run of the same step. Where a capture
    fails, or that comparison does, no further one is tried: steps run eagerly, `refused` says why, and a warning did.

    Graphs go together, once the device is done with them: they share a stream, and torch may free that stream's cuBLAS
    workspace with any one of them, whose address the others hold.

    Not thread-safe: the caller holds the module's lock.

    Args:
        capture: makes a graph of a step; another one in tests.
        wait: returns once the device is done with all replays; another one in tests.
    """

    def __init__(
        self,
        capture: Callable[[Callable[[], None], torch.device], Replayable] | None = None,
        wait: Callable[[torch.device], None] | None = None,
    ) -> None:
        self._capture = capture or CudaCapture()
        self._wait = wait or _wait_for
        self._device = torch.device("cpu")  # of the newest capture
        self._kept: dict[Hashable, Replayable] = {}
        self._uses: Counter[Hashable] = Counter()
        self.refused: str | None = None
        self.replays = 0

    def __len__(self) -> int:
        return len(self._kept)

    def has(self, key: Hashable) -> bool:
        """Return True if the next step of this key is a replay."""
        return key in self._kept

    def clear(self) -> None:
        """Drop all graphs: something they read has moved, or they are too many. They are captured anew."""
        if self._kept:
            self._wait(self._device)
        self._kept.clear()
        self._uses.clear()

    def run(self, key: Hashable, work: Callable[[], None], result: Callable[[], torch.Tensor]) -> None:
        """Do the work of a step, by a replay where there is a graph of it.

        Args:
            key: the step's shape; equal keys are the same launches over the same tensors.
            work: the launches.
            result: what they leave behind, a view.
        """
        graph = self._kept.get(key)
        if graph is not None:
            graph.replay()
            self.replays += 1
            return
        work()
        self._uses[key] += 1
        if self._uses[key] >= USES and self.refused is None:
            self._make(key, work, result)

    def _make(self, key: Hashable, work: Callable[[], None], result: Callable[[], torch.Tensor]) -> None:
        """Capture a step that has just run eagerly, and replay it once: a step may be repeated, it writes the same."""
        eager = result().clone()
        self._device = eager.device
        if len(self._kept) >= KEPT:
            self.clear()
        try:
            graph = self._capture(work, eager.device)
            result().zero_()
            graph.replay()
            if not torch.equal(result().view(torch.uint8), eager.view(torch.uint8)):  # bits: NaN is a result too
                self.refused = "a replay gave other numbers than the eager step"
        except Exception as problem:  # whatever a module may do that a graph cannot: wait for the device, allocate, ...
            first = next(iter(str(problem).strip().splitlines()), "")
            self.refused = f"its capture failed: {type(problem).__name__}: {first[:200]}"
        if self.refused is None:
            self._kept[key] = graph
            return
        self.clear()
        warnings.warn(f"no CUDA graphs: {self.refused}; steps run without", RuntimeWarning, stacklevel=2)
        work()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CudaCapture:
    """Captures work as a CUDA graph. Graphs of one share a stream and a memory pool: no two are replayed at once."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], None], device: torch.device) -> Replayable:
        with _capturing, torch.cuda.device(device):
            caller, stream = torch.cuda.current_stream(), self._stream
            if stream is None or stream.device != device:  # torch's own stream for captures is on one device for good
                stream, self._pool = torch.cuda.Stream(device), None
                self._stream = stream
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):  # what is made on first use (workspaces, compiled kernels) is made here
                for _ in range(2):
                    work()
            caller.wait_stream(stream)
            if self._pool is None or not self._graphs:  # a pool goes with the last graph that uses it
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    work()
            except BaseException:
                self._recover(graph, caller, device)
                raise
            self._graphs.add(graph)
        return graph

    def _recover(self, graph: torch.cuda.CUDAGraph, caller: torch.cuda.Stream, device: torch.device) -> None:
        """Put right what torch leaves behind where the end of a capture raises: the stream of the capture is current,
        the device's random numbers are marked as being captured, and the allocator still knows the graph."""
        torch.cuda.set_stream(caller)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        _spoilt.append(graph)
        self._pool = None


def obstacle(module: Any) -> str | None:
    """Why steps of this module cannot be captured, by what is known of it; None where nothing is."""
    device = device_of(module)
    if device.type != "cuda":
        return f"the model is on {device.type}"
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    return obstacle_in(module)


def obstacle_in(module: Any) -> str | None:
    """`obstacle` without the device: hooks, routing, and frequencies that look at what is on the device."""
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or hasattr(part, "_hf_hook"):
            return f"{name or 'the model'} has forward hooks, which a replay would not run"
    config = module.config.get_text_config()
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        how = getattr(config, "_experts_implementation", None)
        if how not in _STATIC_EXPERTS:
            return f"its experts are run one by one, by how tokens are routed (experts_implementation={how!r})"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(part.get("rope_type", ""))
        if "dynamic" in kind or kind == "longrope":
            return f"its {kind} rotary frequencies depend on the length, which the host would have to wait for"
    return None


def signature(module: Any, layers: list[Any]) -> Hashable:
    """Changes when a graph would compute something else than the module does now: weights that moved, were cast or
    exchanged; adapters that were added, activated or rescaled; hooks, and forwards that were put over a class's own.

    Args:
        module: a causal LM.
        layers: its adapter layers.
    """
    weights = [(tensor.data_ptr(), tensor.dtype) for tensor in module.parameters()]
    weights += [(tensor.data_ptr(), tensor.dtype) for tensor in module.buffers()]
    adapters = [
        (tuple(sorted(getattr(layer, "scaling", {}).items())), tuple(layer.active_adapters)) for layer in layers
    ]
    parts = [(len(part._forward_hooks), len(part._forward_pre_hooks), _own_forward(part)) for part in module.modules()]
    return hash((tuple(weights), tuple(adapters), tuple(parts)))


def _own_forward(part: Any) -> int:
    return id(vars(part).get("forward"))
