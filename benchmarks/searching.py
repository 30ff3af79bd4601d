"""`generate` end to end: plain sampling, BestOfN and Beam at equal policy tokens, and what the scorer adds."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from common import Machine, model, paired, weighed
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import prm_search as ps
from prm_search.engine.language_model import LanguageModel


def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer over the whole vocabulary, whose id 10 is the delimiter."""
    words = {"\n\n" if i == 10 else f"<{i}>": i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<1>", pad_token="<1>")


class FullText:
    """search-and-learn's scheme as a Scorer: at every step the whole text of every active beam, through both models.

    Nothing is kept from one step to the next, and the prompt is encoded again with every beam. Kinder than the original
    in three ways: it takes token ids (no text is tokenised again), runs all beams in one padded batch, and applies the
    heads to the new tokens only.
    """

    name = "prm"

    def __init__(self, prm: Any, reference: Any, beta: float = 0.05) -> None:
        self.modules = {"prm": prm, "reference": reference}
        self.models = {role: f"full-text {role}" for role in self.modules}
        self.beta = beta

    def score_nodes(self, nodes: Sequence[ps.Node]) -> None:
        """Score the nodes' own tokens; as Scorer.score_nodes."""
        todo = list(dict.fromkeys(part for node in nodes for part in node.path() if not part.scored_by(self.name)))
        if not todo:
            return
        rows = [[*node.tree.prompt_ids, *node.path_ids()] for node in todo]
        for node, row in zip(todo, rows, strict=True):
            for model_id in self.models.values():
                node.tree.meter.add("encoded", model_id, len(row))
        news = [len(node.token_ids) for node in todo]
        mine, theirs = (_logprobs(module, rows, news) for module in self.modules.values())
        for node, a, b in zip(todo, mine, theirs, strict=True):
            node.set_rewards(self.name, self.beta * (a - b))

    def release(self, tree: ps.SearchTree) -> None:
        """Nothing is kept."""


@torch.no_grad()
def _logprobs(lm: Any, rows: list[list[int]], news: list[int]) -> list[np.ndarray]:
    """log p of the last `news[i]` tokens of each row, from one right-padded batch."""
    width, device = max(map(len, rows)), lm.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    hidden = lm.base_model(ids, attention_mask=mask, use_cache=False)[0]
    at = [(i, len(row) - new + t) for i, (row, new) in enumerate(zip(rows, news, strict=True)) for t in range(new)]
    row, column = torch.tensor(at, device=device).T
    logits = lm.get_output_embeddings()(hidden[row, column - 1]).float()
    found = logits.log_softmax(-1).gather(1, ids[row, column][:, None])[:, 0]
    return np.split(found.cpu().numpy(), np.cumsum(news)[:-1])


def measure(
    machine: Machine,
    shape: str,
    prompts: int,
    prompt: int,
    new_tokens: int,
    step: int,
    n: int,
    repeats: int,
    only: Collection[str] = ("plain", "best_of", "beam"),
) -> list[dict[str, Any]]:
    """Lines of the report: seconds of each way to generate, and scorer over policy seconds inside the searches.

    Args:
        machine, shape: which model, and where.
        prompts, prompt: how many, of how many tokens.
        new_tokens, step: of a response, and of a step at most.
        n: responses of a best-of-n, and children at each level of the beam.
        repeats: rounds.
        only: the ways, as "kind" or "kind/scorer".
    """
    policy, prm, other = (model(shape, seed, machine) for seed in (1, 2, 3))
    tokenizer = tokenizer_of(policy.config.vocab_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(11, policy.config.vocab_size, (prompts, prompt), generator=draw).to(machine.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    room = prompts * (prompt + n * (new_tokens + step))  # KV of a best-of-n, so that three models' pools fit together
    served = [LanguageModel.of(module, capacity=room) for module in (policy, prm, other)]
    ps.enable(policy, tokenizer)
    steps = ps.StepRule(delimiter="\n\n", max_tokens=step)
    scorers: dict[str, ps.Scorer] = {
        "shared": ps.ImplicitPRM(prm, policy),
        "separate": ps.ImplicitPRM(prm, other),
        "full_text": FullText(prm, other),
    }
    strategies: dict[str, ps.Strategy] = {f"best_of_{n}": ps.BestOfN(n), f"beam_{n // 4}x4": ps.Beam(n // 4, 4)}
    common = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": 1,
    }

    def plain(rows: int) -> Any:
        return policy.generate(**inputs, num_return_sequences=rows, **common)

    phases: dict[str, list[dict[str, float]]] = {}
    usages: dict[str, Any] = {}

    def guided(name: str, scorer: str, strategy: str) -> None:
        guidance = ps.PRMGuidance(scorers[scorer], strategy=strategies[strategy], steps=steps, seed=0)
        out = policy.generate(**inputs, **common, prm_guidance=guidance, return_dict_in_generate=True)
        phases.setdefault(name, []).append(dict(out.prm[0].usage.seconds))
        usages[name] = [result.usage for result in out.prm]

    runs: dict[str, Any] = {}
    if "plain" in only:
        runs = {"plain_1": lambda: plain(1), f"plain_{n}": lambda: plain(n)}
    ways: dict[str, tuple[str, str]] = {}
    for strategy in strategies:
        kind = strategy.rpartition("_")[0]
        for scorer in scorers:
            if scorer == "full_text" and kind != "beam":
                continue  # a best-of-n is scored once, at its end, in that scheme too
            if kind not in only and f"{kind}/{scorer}" not in only:
                continue
            name = f"{strategy}/{scorer}"
            ways[name] = scorer, strategy
            runs[name] = lambda name=name, scorer=scorer, strategy=strategy: guided(name, scorer, strategy)
    peaks = {name: weighed(run)[1] for name, run in runs.items()}  # which also warms them up
    seconds = paired(runs, repeats, warmup=0)
    sampler = ps.HFPolicy(policy, tokenizer, stop_ids=[])
    first = {
        name: [first_step(sampler, scorers[scorer], strategies[strategy], ids.tolist(), step) for _ in range(repeats)]
        for name, (scorer, strategy) in ways.items()
        if strategy.startswith("beam")
    }
    lines = []
    for name, values in seconds.items():
        line: dict[str, Any] = {"shape": shape, "way": name, "seconds": statistics.median(values)}
        if name in usages:
            share = [phase["scorer"] / phase["policy"] for phase in phases[name][-repeats:]]
            line["scorer_over_policy_seconds"] = statistics.median(share)
            for kind in ("sampled_tokens", "encoded_tokens"):
                line[kind] = _total([getattr(usage, kind) for usage in usages[name]])
        if name.endswith("/full_text"):
            line["largest_difference"] = _apart(scorers["separate"], scorers["full_text"], ids[0].tolist(), step)
        if name in first:
            line["first_step_seconds"] = statistics.median(first[name])
        if peaks[name] is not None:
            line["peak_bytes"] = peaks[name]
        lines.append(line)
    ps.disable(policy)
    del served
    return lines


def _apart(one: ps.Scorer, other: ps.Scorer, prompt: list[int], length: int) -> float:
    """Largest difference between two scorers' token rewards on a small tree: a step, and two steps that follow it."""
    found = []
    for scorer in (one, other):
        tree = ps.SearchTree(ps.Prompt(token_ids=tuple(prompt)))
        node = tree.add(tree.root, prompt[:length])
        leaves = [tree.add(node, prompt[i : i + length]) for i in (1, 2)]
        scorer.score_nodes([node])
        scorer.score_nodes(leaves)
        found.append(np.concatenate([part.rewards[scorer.name] for part in (node, *leaves)]))
        scorer.release(tree)
    return float(np.abs(found[0] - found[1]).max())


def _total(parts: list[dict[str, int]]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for part in parts:
        totals.update(part)
    return dict(totals)


def first_step(
    policy: ps.HFPolicy, scorer: ps.Scorer, strategy: ps.Strategy, prompts: list[list[int]], step: int
) -> float:
    """Seconds from the call until the first step of a search is committed: prompts read, a step drawn and scored."""
    begin = time.perf_counter()
    seen: list[float] = []
    ps.search(
        prompts,
        policy=policy,
        scorer=scorer,
        strategy=strategy,
        steps=ps.StepRule(delimiter="\n\n", max_tokens=step),
        max_new_tokens=2 * step,
        on_event=lambda event: seen.append(time.perf_counter() - begin),
    )
    return seen[0]
