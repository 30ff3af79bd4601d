"""Scoring a growing tree: ours against naive re-encoding, prompt-cached re-encoding and an incremental DynamicCache.

Every method computes the token rewards of the same N x L new tokens at each of S steps, for beams that fork: after a
step, each group of four children goes on from one survivor. The rivals are written as well as the public API allows:
one batch, no padding (all beams are of one length), the head only on rows that are scored.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Ceilings, Machine, model, paired, ratio, token_bytes, weighed
from transformers import DynamicCache

from prm_search import ImplicitPRM, Prompt, SearchTree

BETA = 0.05


@dataclass
class Work:
    """A prompt, and for each step every beam's parent beam and new tokens."""

    prompt: list[int]
    parents: list[list[int]]
    tokens: list[list[list[int]]]

    @classmethod
    def draw(cls, vocab: int, prompt: int, beams: int, length: int, steps: int, seed: int = 0) -> Work:
        rnd = random.Random(seed)
        ids = lambda n: [rnd.randrange(vocab) for _ in range(n)]  # noqa: E731
        parents, tokens = [[0] * beams], []
        for step in range(steps):
            if step:
                kept = rnd.sample(range(beams), max(1, beams // 4))
                parents.append([kept[i * len(kept) // beams] for i in range(beams)])
            tokens.append([ids(length) for _ in range(beams)])
        return cls(ids(prompt), parents, tokens)

    def live(self, step: int) -> int:
        """Distinct tokens on the paths of a step's beams: the KV that beams sharing what they share must hold."""
        length, held = len(self.tokens[0][0]), len(self.prompt)
        beams = set(range(len(self.tokens[step])))
        for s in range(step, -1, -1):
            held += length * len(beams)
            beams = {self.parents[s][beam] for beam in beams}
        return held

    def most_live(self) -> int:
        """The largest `live`."""
        return max(self.live(step) for step in range(len(self.tokens)))

    def copied(self) -> int:
        """Tokens of KV at the end where every beam has a copy of its whole path."""
        beams, length = len(self.tokens[0]), len(self.tokens[0][0])
        return beams * (len(self.prompt) + length * len(self.tokens))

    def paths(self, step: int) -> list[list[int]]:
        """Response tokens of every beam up to and with a step."""
        paths = self.tokens[0]
        for s in range(1, step + 1):
            paths = [paths[p] + new for p, new in zip(self.parents[s], self.tokens[s], strict=True)]
        return paths


def _pick(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None]).squeeze(-1)


def _tail(lm: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p of ids from the hidden rows before them."""
    return _pick(lm.get_output_embeddings()(hidden), ids)


@torch.no_grad()
def naive(lm: Any, work: Work, device: str) -> list[torch.Tensor]:
    """Every beam's whole prefix at every step (search-and-learn, its_hub, ThinkBooster)."""
    found = []
    for step in range(len(work.tokens)):
        rows = torch.tensor([work.prompt + path for path in work.paths(step)], device=device)
        new = len(work.tokens[step][0])
        hidden = lm.base_model(rows, use_cache=False)[0]
        found.append(_tail(lm, hidden[:, -new - 1 : -1], rows[:, -new:]))
    return found


@torch.no_grad()
def prompt_cached(lm: Any, work: Work, device: str) -> list[torch.Tensor]:
    """The prompt's KV kept, a beam's own tokens encoded again at every step."""
    beams = len(work.tokens[0])
    prompt = torch.tensor([work.prompt], device=device)
    cache = DynamicCache()
    first = lm.base_model(prompt, past_key_values=cache, use_cache=True)[0][:, -1:]
    cache.batch_repeat_interleave(beams)
    found = []
    for step in range(len(work.tokens)):
        rows = torch.tensor(work.paths(step), device=device)
        new = len(work.tokens[step][0])
        hidden = lm.base_model(rows, past_key_values=cache, use_cache=True)[0]
        cache.crop(-rows.shape[1])
        hidden = torch.cat([first.expand(beams, -1, -1), hidden], 1)
        found.append(_tail(lm, hidden[:, -new - 1 : -1], rows[:, -new:]))
    return found


@torch.no_grad()
def dynamic_cache(lm: Any, work: Work, device: str) -> list[torch.Tensor]:
    """KV kept per beam and reordered at every fork, the last hidden row kept beside it."""
    beams = len(work.tokens[0])
    cache = DynamicCache()
    prompt = torch.tensor([work.prompt], device=device)
    last = lm.base_model(prompt, past_key_values=cache, use_cache=True)[0][:, -1:].expand(beams, -1, -1)
    cache.batch_repeat_interleave(beams)
    found = []
    for step, tokens in enumerate(work.tokens):
        if step:
            order = torch.tensor(work.parents[step], device=device)
            cache.reorder_cache(order)
            last = last[order]
        rows = torch.tensor(tokens, device=device)
        hidden = lm.base_model(rows, past_key_values=cache, use_cache=True)[0]
        found.append(_tail(lm, torch.cat([last, hidden[:, :-1]], 1), rows))
        last = hidden[:, -1:]
    return found


RIVALS: dict[str, Callable[..., list[torch.Tensor]]] = {
    "naive": naive,
    "prompt_cached": prompt_cached,
    "dynamic_cache": dynamic_cache,
}


def rival_rewards(method: str, prm: Any, ref: Any, work: Work, device: str) -> list[np.ndarray]:
    """Token rewards [beams, L] of each step by one of RIVALS."""
    run = RIVALS[method]
    pairs = zip(run(prm, work, device), run(ref, work, device), strict=True)
    return [(BETA * (a - b)).cpu().numpy() for a, b in pairs]


def our_rewards(pair: ImplicitPRM, work: Work, streams: bool | None = None) -> tuple[list[np.ndarray], dict[str, int]]:
    """The same through SearchTree and ImplicitPRM, with the counts of the tree's meter and the KV held at the end.

    Args:
        pair, work: whose rewards, of what.
        streams: whether each model has a CUDA stream of its own; None leaves that as it is.
    """
    if streams is not None:
        for lm in filter(None, (pair.prm, pair.reference)):
            lm.own_stream(streams)
    tree = SearchTree(Prompt(token_ids=tuple(work.prompt)))
    beams, found = [tree.root] * len(work.tokens[0]), []
    for parents, tokens in zip(work.parents, work.tokens, strict=True):
        beams = [tree.add(beams[p], new) for p, new in zip(parents, tokens, strict=True)]
        pair.score_nodes(beams)
        found.append(np.stack([node.token_rewards for node in beams]))
    counts = {f"{kind}": 0 for kind in ("encoded", "reencoded")}
    for (kind, model_id), n in tree.meter.counts.items():
        if model_id == pair.models["prm"] and kind in counts:
            counts[kind] += n
    counts["held"] = pair.prm.tree.used
    pair.release(tree)
    return found, counts


def step_floor(lm: Any, ceilings: Ceilings, prompt: int, beams: int, length: int, steps: int) -> float:
    """Seconds that scoring cannot go below: every new token once through both models, at the measured ceilings.

    A step is the larger of its arithmetic (weights, head and attention over what came before) and one reading of the
    weights. KV and activations are left out, so the floor is a little low.
    """
    config, total = lm.config, 0.0
    width = config.hidden_size
    head = lm.get_output_embeddings().weight
    body = sum(p.numel() for p in lm.base_model.parameters()) - lm.get_input_embeddings().weight.numel()
    for step in range(steps):
        tokens, before = beams * length, prompt + step * length
        attention = 4 * config.num_hidden_layers * width * tokens * (before + (length + 1) / 2)
        flop = 2.0 * (body + head.numel()) * tokens + attention
        if step == 0:
            flop += 2.0 * body * prompt + 2 * config.num_hidden_layers * width * prompt**2
        total += ceilings.floor(flop, (body + head.numel()) * head.element_size())[0]
    return 2 * total


def _keep(results: dict[str, Any], name: str, way: Callable[[Work], Any], work: Work) -> None:
    results[name] = way(work)


def compare(
    machine: Machine, shape: str, prompt: int, beams: int, length: int, steps: int, repeats: int, methods: list[str]
) -> dict[str, Any]:
    """One line of the report: seconds, ratios to ours, tokens encoded a model, KV held, largest difference in rewards.

    Without `methods` ours runs alone, in pools just large enough for the live paths: the line for memory.
    """
    prm, ref = model(shape, 1, machine), model(shape, 2, machine)
    work = Work.draw(prm.config.vocab_size, prompt, beams, length, steps)
    every = prompt + beams * length * steps
    pair = ImplicitPRM(
        prm, ref, beta=BETA, capacity=every if methods else min(every, work.most_live() + beams * length)
    )
    cuda = machine.device == "cuda"
    ways: dict[str, Callable[[Work], Any]] = {"ours": lambda given: our_rewards(pair, given, False if cuda else None)}
    if cuda and methods:
        ways["ours_streams"] = lambda given: our_rewards(pair, given, streams=True)
    for method in methods:
        ways[method] = lambda given, method=method: (rival_rewards(method, prm, ref, given, machine.device), None)
    first = Work(work.prompt, work.parents[:1], work.tokens[:1])
    peaks, absent = {}, {}
    for name, way in list(ways.items()):  # a warm-up: the first step, or on a GPU the whole, for its peak of memory
        try:
            peaks[name] = weighed(partial(way, work if cuda else first))[1]
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
            del ways[name]
    results: dict[str, Any] = {}
    runs = {name: partial(_keep, results, name, way, work) for name, way in ways.items()}
    seconds = paired(runs, repeats, warmup=0)
    ours, counts = results["ours"]
    differences = {
        name: max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
        for name, (theirs, _) in results.items()
        if name != "ours"
    }
    own = [step * length for step in range(1, steps + 1)]
    encoded = {
        "ours": counts["encoded"],
        "naive": beams * sum(prompt + n for n in own),
        "prompt_cached": prompt + beams * sum(own),
        "dynamic_cache": prompt + beams * steps * length,
    }
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": shape,
        "prompt": prompt,
        "beams": beams,
        "length": length,
        "steps": steps,
        "seconds": middle,
        "over_ours": {name: ratio(seconds[name], seconds["ours"]) for name in seconds if name != "ours"},
        "share_of_floor": step_floor(prm, Ceilings.measure(machine), prompt, beams, length, steps) / middle["ours"],
        "encoded_tokens": {name: encoded[name] for name in seconds if name in encoded},
        "kv_tokens": {"live": work.most_live(), "ours_held": counts["held"], "copies": work.copied()},
        "kv_token_bytes": token_bytes(shape, machine.dtype.itemsize),
        "weight_bytes": 2 * sum(p.numel() * p.element_size() for p in prm.parameters()),
        "peak_bytes": {name: peak for name, peak in peaks.items() if peak is not None},
        "largest_difference": differences,
        "absent": absent,
    }


def held(shape: str, prompt: int, beams: int, length: int, steps: int) -> dict[str, Any]:
    """KV of one model in bf16, by counting tokens: nothing is run, so any machine can say it of any shape."""
    work = Work.draw(1000, prompt, beams, length, steps)
    size = token_bytes(shape)
    return {
        "shape": shape,
        "prompt": prompt,
        "beams": beams,
        "length": length,
        "steps": steps,
        "kv_bytes": {
            "copies": work.copied() * size,
            "prompt_shared": (prompt + beams * length * steps) * size,
            "tree_shared": work.most_live() * size,
        },
    }
