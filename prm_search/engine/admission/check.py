"""Admission: a model is served only if its packed forward gives the log-probabilities of its own plain forward.

Three questions are asked. Is the family right: does a miniature of it (miniature.py), in fp32, agree to 1e-4 nat over
an unevenly grown, forked and evicted tree that crosses each of its limits? Is this very module right: does a short tree
agree, coarsely, in its own dtype, on its own devices, with its own quantisation, hooks and adapters? And does PEFT's
wrapper, which we run without, do nothing but pass on?
What does not agree is refused by name. A wrong family seldom raises: it returns wrong log-probs.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .. import adapters
from ..module_run import own_modes
from . import miniature

if TYPE_CHECKING:
    from ..encoder import Encoder
    from ..kv_tree import Branch

    Make = Callable[..., Encoder]  # (module, state, capacity=) -> an unchecked one

TOLERANCE = 1e-4  # nats, any log-prob of the miniature; ...
ILL_CONDITIONED = 1e-3  # ... at most this, where its plain forward itself is that sensitive to rounding
LENGTH = 72  # tokens of each path through the miniature's tree: past every limit, several times
LARGEST_MINIATURE = 20_000_000  # parameters
LARGEST_COPY = 50_000_000  # parameters of a model that is copied to fp32 where no miniature can be built ...
LONGEST_COPY = 4096  # ... and tokens that it may take to cross its limits

# Mean error in nats over a short tree of the real model. Packed and plain forwards round differently (bf16 logits of 20
# are 0.06 apart; dynamic quantisation looks at the whole batch), a wrong forward is off by whole nats.
COARSE = {torch.float64: 1e-4, torch.float32: 0.02, torch.bfloat16: 0.15, torch.float16: 0.15}
COARSE_QUANTISED = 0.3

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class _Passing(Exception):
    """A refusal that rests on an exception, whose cause may be gone in the next call."""


_verdicts: dict[tuple[type, str], str | None] = {}  # family and config -> why it is refused, None: it is served


@dataclass(frozen=True)
class Fault:
    """The error of a packed forward: nats, over the tokens' log-probs and the leaves' distributions."""

    worst: float
    mean: float


def check(module: nn.Module, state: tuple[str, ...] | None, make: Make) -> int:
    """Refuse a model that would not be served exactly.

    The module is left as it is, and so is torch's RNG state. The verdict on a family is kept, by the content of its
    config; the module itself is looked at in each call.

    Args:
        module: a transformers causal LM, unwrapped.
        state: adapters it runs with; None for the base weights.
        make: makes an Encoder without asking here.

    Returns:
        bytes of KV that a token takes in this module.

    Raises:
        ValueError: the model is in training mode, or refused; says why.
    """
    if module.training:
        raise ValueError("the model is in training mode, where dropout makes its probabilities random: call .eval()")
    config: Any = module.config
    name = f"{config.model_type} ({type(module).__name__})"
    with _undisturbed(adapters.device_of(module).type):
        refusal = _verdict(module, make)
        try:
            verdict = refusal or _look_at(module, state, make)
        except _OUT_OF_MEMORY:
            raise
        except Exception as problem:
            raise ValueError(f"{name} is not supported: its forward fails: {_short(problem)}") from problem
    if isinstance(verdict, str):
        raise ValueError(f"{name} is not supported: {verdict}")
    return verdict


def check_wrapper(wrapper: Any, module: nn.Module, state: tuple[str, ...]) -> None:
    """Refuse adapters whose effect lies in PEFT's wrapper: we run the module inside it.

    Args:
        wrapper: a PeftModel.
        module: the transformers model inside it, unwrapped.
        state: the adapters to compare with.

    Raises:
        ValueError: the wrapper's forward gives other log-probabilities than the module's.
    """
    layers = adapters.tuner_layers(module)
    size = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.from_numpy(np.random.default_rng(3).choice(min(size, 10_000), (1, 24)))
    ids = ids.to(adapters.device_of(module))

    def log_softmax(run: Any) -> torch.Tensor:
        return torch.log_softmax(run(input_ids=ids, use_cache=False).logits.double(), dim=-1)

    with _undisturbed(ids.device.type), adapters.switched(layers, state), adapters.activated(wrapper, state):
        once, again, wrapped = log_softmax(module), log_softmax(module), log_softmax(wrapper)
    off, noise = (wrapped - once).abs().max().item(), (again - once).abs().max().item()
    if not off <= TOLERANCE + 10 * noise:
        raise ValueError(
            f"adapters {list(state)} are not supported: a part of their effect lies in {type(wrapper).__name__}, "
            f"outside the model's own layers (log-probs differ by {off:.2g} nat without it)"
        )


@contextmanager
def _undisturbed(kind: str) -> Iterator[None]:
    """As if nobody had set a default device or dtype, inference mode or autocast."""
    before = torch.get_default_dtype()
    with own_modes(kind), torch.device("cpu"):
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(before)


def _verdict(module: nn.Module, make: Make) -> str | None:
    """Why the module's family is refused, or None. Kept, unless it may be another in the next call."""
    key = (type(module), _content(module.config))
    if key not in _verdicts:
        try:
            _verdicts[key] = _judge(module, make)
        except _Passing as problem:
            return str(problem)
    return _verdicts[key]


def compare(lm: Encoder, length: int, seed: int = 0) -> Fault:
    """Grow a tree through an Encoder and compare it with the plain forward of the same module.

    The tree is forked at the ends and in the middle of branches, in steps of 1 to many tokens, siblings together. Its
    four paths of `length` tokens do not fit into a KV capacity of two, so branches are evicted and encoded again.

    Args:
        lm: with a capacity of at least `length` tokens.
        length: tokens of a path, at least 16.
        seed: of the token ids.
    """
    draw = _token_source(lm, seed)
    cut = [max(1, round(length * part)) for part in (0.3, 0.07, 0.18, 0.15, 0.11)]
    prompt = lm.tree.root()
    logprobs: dict[int, np.ndarray] = {}

    def grow(branches: list[Branch], counts: list[int]) -> None:
        ids = [draw(count) for count in counts]
        for branch, values in zip(branches, lm.extend(branches, ids, want="target") or (), strict=True):
            logprobs[id(branch)] = np.concatenate((logprobs.get(id(branch), np.zeros(0)), np.asarray(values)))

    grow([prompt], [cut[0]])
    first, second = lm.tree.fork(prompt), lm.tree.fork(prompt)
    grow([first, second], [cut[1], cut[2]])
    leaves = [lm.tree.fork(first), lm.tree.fork(first), lm.tree.fork(second), lm.tree.fork(prompt, at=cut[0] // 2)]
    grow(leaves, [1, cut[3], cut[4], cut[1]])
    grow(leaves, [(length - leaf.length) // 2 for leaf in leaves])
    grow(leaves[:2], [length - leaf.length for leaf in leaves[:2]])
    grow(leaves[2:], [length - leaf.length for leaf in leaves[2:]])
    ends = lm.extend(leaves, [()] * len(leaves), want="log_softmax")

    ids = torch.tensor([leaf.path_ids() for leaf in leaves])
    plain = plain_log_softmax(lm, ids)
    errors = [_apart(ends.cpu().double().numpy(), plain[:, -1]).max(axis=-1)]  # type: ignore[union-attr]
    chosen = np.take_along_axis(plain[:, :-1], ids.numpy()[:, 1:, None], axis=-1)[..., 0]
    for row, leaf in enumerate(leaves):
        for branch in leaf.lineage():
            values = logprobs[id(branch)]
            stop = min(leaf.length, branch.length)
            scored = range(stop - len(values), stop)  # positions of these tokens on the path, where it goes that far
            if leaf is leaves[3] and branch is prompt:  # left in its middle
                values, scored = values[: leaf.start], range(leaf.start)
            at = np.array([t for t in scored if t > 0], dtype=np.int64)
            errors.append(_apart(values[at - scored.start], chosen[row, at - 1]))
    for branch in (*leaves, first, second, prompt):
        lm.tree.release(branch)
    every = np.concatenate(errors)
    return Fault(float(every.max()), float(every.mean()))


def _apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute differences; equal infinities do not differ, and what is not a number is infinitely far off."""
    with np.errstate(invalid="ignore"):
        apart = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
    return np.where(np.isnan(apart), math.inf, apart)


def plain_log_softmax(lm: Encoder, ids: torch.Tensor) -> np.ndarray:
    """[B, T] ids -> [B, T, V] float64 log-probs of the module's own forward, without cache, with lm's adapters."""
    with lm.exclusive(), own_modes(lm.device.type):
        logits = lm.module(input_ids=ids.to(lm.device), use_cache=False).logits
    return torch.log_softmax(logits.double(), dim=-1).cpu().numpy()


# --- the family ----------------------------------------------------------------------------------------------------


def _judge(module: nn.Module, make: Make) -> str | None:
    """Why a family is refused, or None."""
    if getattr(module, "_is_stateful", False):
        return "it keeps a state beside keys and values (recurrent, convolutional or compressing layers)"
    if getattr(module.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    try:
        small = miniature.shrink(module.config)
        with miniature.quiet(), torch.device("meta"):
            size = sum(p.numel() for p in type(module)(small).parameters())
        if size > LARGEST_MINIATURE:
            raise ValueError(f"its miniature has {size} parameters")
        model, length = miniature.build(type(module), small), LENGTH
        with torch.no_grad():
            model(input_ids=torch.full((1, LENGTH), miniature.FIRST_WORD), use_cache=False).logits  # noqa: B018
    except _OUT_OF_MEMORY:
        raise
    except Exception as problem:  # any of a family's own: sizes that do not go together, a missing dependency
        duplicate, length = _copy(module), max([0, *miniature.limits(module.config)]) + LENGTH
        if duplicate is None or length > LONGEST_COPY:
            raise _Passing(f"no small copy of it could be made to check it on ({_short(problem)})") from problem
        model = duplicate
    lm = make(model, None, capacity=2 * length)
    return examine(lm, length if lm.context is None else min(length, lm.context))


def examine(lm: Encoder, length: int = LENGTH) -> str | None:
    """Return what is wrong with the packed forward of an fp32 model, or None."""
    try:
        fault = compare(lm, length)
    except _OUT_OF_MEMORY:
        raise
    except Exception as problem:
        raise _Passing(f"{_cause(lm, length) or 'its packed forward fails'}: {_short(problem)}") from problem
    if fault.worst <= TOLERANCE or fault.worst <= tolerance(lm, length):
        return None
    cause = _cause(lm, length)
    return f"log-probs differ by {fault.worst:.2g} nat after forks{f': {cause}' if cause else ''}"


def tolerance(lm: Encoder, length: int) -> float:
    """Nats that rounding may explain: TOLERANCE, or ten times what one rounding of the embeddings does to a forward.

    Every layer rounds again, and sharp thresholds (Gemma 3n's sparse activations) carry a rounding of 1e-7 to 1e-4
    nat; wrong attention shows as whole nats. Changes the module's embeddings for the time of one forward: only for
    models made here.
    """
    ids = torch.tensor([_token_source(lm, 2)(length)])
    weight = lm.module.get_input_embeddings().weight
    kept, noise = weight.detach().clone(), torch.Generator().manual_seed(0)
    before = plain_log_softmax(lm, ids)
    with torch.no_grad():
        try:
            step = torch.finfo(weight.dtype).eps
            weight.mul_(1 + step * (2 * torch.rand(weight.shape, generator=noise, dtype=weight.dtype) - 1))
            after = plain_log_softmax(lm, ids)
        finally:
            weight.copy_(kept)
    return min(max(TOLERANCE, 10 * float(_apart(after, before).max())), ILL_CONDITIONED)


def _cause(lm: Encoder, length: int) -> str | None:
    """The likely reason of a disagreement, for the message."""
    kinds = {str(kind) for kind in getattr(lm.config, "layer_types", None) or ()}
    odd = sorted(k for k in kinds if not k.endswith(("full_attention", "sliding_attention", "global_attention")))
    if odd:
        return f"it has layers of kind {', '.join(odd)}"
    draw = _token_source(lm, 1)
    ids = torch.tensor([draw(length)])
    try:
        whole, half = plain_log_softmax(lm, ids), plain_log_softmax(lm, ids[:, : length // 2])
        if np.abs(whole[:, : length // 2] - half).max() > TOLERANCE:
            return "its log-probs of a prefix change with what follows, so it is not a causal model"
        with lm.exclusive(), torch.no_grad():
            hidden = lm.module.base_model(input_ids=ids.to(lm.device), use_cache=False)[0][0]
            if np.abs(lm.head.log_softmax(hidden).double().cpu().numpy() - whole[0]).max() > TOLERANCE:
                return "its head does more than a matrix product, a factor and a soft-cap"
    except _OUT_OF_MEMORY:
        raise
    except Exception as problem:
        raise _Passing(f"its plain forward fails: {_short(problem)}") from problem
    if len(lm.pool.layers) < getattr(lm.config, "num_hidden_layers", 0):
        return "its attention does not go through transformers' attention interface"
    return None


def _copy(module: nn.Module) -> nn.Module | None:
    """The model itself in fp32 on the CPU, where it is small and its weights are ordinary numbers."""
    weights = list(module.parameters())
    ordinary = all(w.is_floating_point() and w.device.type != "meta" and w.dtype.itemsize > 1 for w in weights)
    if not ordinary or sum(w.numel() for w in weights) > LARGEST_COPY or adapters.tuner_layers(module):
        return None
    return copy.deepcopy(module).to("cpu").float()


def _content(config: Any) -> str:
    """Return what makes two configs the same family and sizes."""
    other = ("_name_or_path", "transformers_version", "dtype", "architectures", "quantization_config")
    content = {name: value for name, value in config.to_dict().items() if name not in other}
    return json.dumps(content, sort_keys=True, default=str)


# --- the module ----------------------------------------------------------------------------------------------------


def _look_at(module: nn.Module, state: tuple[str, ...] | None, make: Make) -> str | int:
    """Why this module is refused although its family is served, or the bytes of its KV a token."""
    quantised = getattr(module, "is_quantized", False) or hasattr(module.config, "quantization_config")
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    allowed = COARSE_QUANTISED if quantised else COARSE.get(dtype, COARSE_QUANTISED)
    length = 24
    lm = make(module, state, capacity=2 * length)
    if lm.context is not None and lm.context < length:
        return f"its context of {lm.context} tokens is too short to check it on"
    fault = compare(lm, length)
    if fault.mean <= allowed:
        return -(-lm.pool.bytes() // lm.pool.slots)
    return (
        f"this model's packed forward is off by {fault.mean:.2g} nat on average ({fault.worst:.2g} at worst) in "
        f"{'its quantised form' if quantised else dtype}, {allowed} are allowed"
    )


def _token_source(lm: Encoder, seed: int) -> Callable[[int], list[int]]:
    """Draws ordinary token ids: none that the config gives a meaning (padding, images, ends)."""
    special: set[int] = set()
    for name, value in _flat(lm.module.config.to_dict()):
        if miniature.is_token(name):
            special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    size = min(lm.head.vocab, getattr(lm.config, "vocab_size", lm.head.vocab))
    ordinary = np.setdiff1d(np.arange(size), sorted(special))
    ordinary = ordinary[min(miniature.FIRST_WORD, len(ordinary) // 2) :]
    random = np.random.default_rng(seed)
    return lambda count: [int(i) for i in random.choice(ordinary, count)]


def _flat(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield str(name), value


def _short(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"
