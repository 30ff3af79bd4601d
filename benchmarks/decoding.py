"""Decoding one token for each of R rows: ours against a DynamicCache of R rows."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import Ceilings, Machine, model, paired, ratio, weighed, weight_bytes
from transformers import DynamicCache

from prm_search.engine.graph_step.choice import Mode
from prm_search.engine.language_model import LanguageModel


class Ours:
    """R rows behind `families` parents whose paths have `context` tokens, `prompt` of them shared by all."""

    def __init__(self, lm: LanguageModel, prompt: int, context: int, rows: int, families: int) -> None:
        draw = torch.Generator().manual_seed(0)
        ids = lambda n: torch.randint(lm.head.vocab, (n,), generator=draw).tolist()  # noqa: E731
        self.lm, self.rows = lm, rows
        self.root = lm.tree.root(ids(prompt))
        self.parents = [lm.tree.fork(self.root, ids(context - prompt)) for _ in range(families)]
        lm.extend(self.parents, [[]] * families, want=None)

    def run(self, tokens: int, mode: Mode = "auto") -> None:
        """Decode `tokens` tokens a row, greedily, and forget them."""
        self.lm.token_steps.set_mode(mode)
        each = self.rows // len(self.parents)
        branches = [self.lm.tree.fork(parent) for parent in self.parents for _ in range(each)]
        table = self.lm.extend(branches, [[]] * self.rows, want="log_softmax")
        for _ in range(tokens):
            chosen = table.argmax(-1).tolist()
            table = self.lm.extend(branches, [[token] for token in chosen], want="log_softmax")
        for branch in branches:
            self.lm.tree.release(branch)


class Theirs:
    """A DynamicCache of R rows of `context` tokens."""

    @torch.no_grad()
    def __init__(self, lm: Any, context: int, rows: int, device: str) -> None:
        self.lm, self.cache = lm, DynamicCache()
        ids = torch.randint(lm.config.vocab_size, (rows, context), device=device)
        self.hidden = lm.base_model(ids, past_key_values=self.cache, use_cache=True)[0][:, -1]

    @torch.no_grad()
    def run(self, tokens: int) -> None:
        hidden = self.hidden
        for _ in range(tokens):
            table = torch.log_softmax(self.lm.get_output_embeddings()(hidden).float(), -1)
            chosen = table.argmax(-1)
            hidden = self.lm.base_model(chosen[:, None], past_key_values=self.cache, use_cache=True)[0][:, -1]
        self.cache.crop(-tokens)


def compare(
    machine: Machine, shape: str, context: int, rows: int, families: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """One line of the report: milliseconds a forward of all rows, and the ratio."""
    module = model(shape, 1, machine)
    lm = LanguageModel.of(module, capacity=context * families + rows * (tokens + 1))
    peaks = {}
    ours, peaks["ours"] = weighed(lambda: Ours(lm, context // 4, context, rows, families))
    theirs, peaks["dynamic_cache"] = weighed(lambda: Theirs(module, context, rows, machine.device))
    runs = {"ours": lambda: ours.run(tokens), "dynamic_cache": lambda: theirs.run(tokens)}
    if machine.device == "cuda":
        runs["no_graph"] = lambda: ours.run(tokens, "packed")
    seconds = paired(runs, repeats)
    ours.lm.token_steps.set_mode("auto")
    step = ours.lm.token_steps.choice(rows, context + tokens)
    middle = {name: statistics.median(values) / tokens for name, values in seconds.items()}
    floor = weight_bytes(module) / Ceilings.measure(machine).bandwidth
    return {
        "shape": shape,
        "context": context,
        "rows": rows,
        "families": families,
        "ms": {name: 1e3 * value for name, value in middle.items()},
        "step": f"{step.way}: {step.reason}",
        "ours_over_dynamic_cache": ratio(seconds["ours"], seconds["dynamic_cache"]),
        "weight_floor_ms": 1e3 * floor,
        "over_weight_floor": middle["ours"] / floor,
        "no_graph_over_ours": ratio(seconds["no_graph"], seconds["ours"]) if "no_graph" in seconds else None,
        "context_peak_bytes": {name: peak for name, peak in peaks.items() if peak is not None},
    }
