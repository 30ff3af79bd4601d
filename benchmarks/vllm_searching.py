"""Step search over vLLM: scoring through the prefix cache against `prompt_logprobs`, which encodes every path anew."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from common import Machine, model, paired
from searching import tokenizer_of

import prm_search as ps
from prm_search.integrations.vllm import VLLMImplicitPRM, VLLMPolicy
from prm_search.integrations.vllm.logprob_requests import SpanRequest
from prm_search.integrations.vllm.scoring_engine import ScoredEngine


class Reencoding:
    """The baseline over vLLM's own interface: `prompt_logprobs` of each path, for which vLLM skips its prefix cache.

    It asks for the same rows, and a step's own log-probabilities are kept: only the cache is missing.
    """

    name = "prm"

    def __init__(self, llm: Any, beta: float = 0.05) -> None:
        engine = ScoredEngine.of(llm)
        assert engine is not None
        self.engine, self.beta, self.models = engine, beta, {"prm": engine.id}

    def score_nodes(self, nodes: Sequence[ps.Node]) -> None:
        """As Scorer.score_nodes; a search scores each node after its parent."""
        spans = [
            SpanRequest((*node.tree.prompt_ids, *node.path_ids()), len(node.tree.prompt_ids) + node.start, cached=False)
            for node in nodes
        ]
        for node, span, answer in zip(nodes, spans, self.engine.begin(spans).result(), strict=True):
            node.tree.meter.add("encoded", self.engine.id, len(span.token_ids))
            node.set_rewards(self.name, self.beta * (answer.logprobs - node.logprobs))

    def release(self, tree: ps.SearchTree) -> None:
        """Nothing is kept."""


@contextmanager
def engines(shape: str, machine: Machine, length: int) -> Iterator[list[Any]]:
    """A policy and a PRM of a shape with random weights, in vLLM engines of this process."""
    from vllm import LLM

    made = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in (1, 2):
            module = model(shape, seed, machine)
            module.save_pretrained(f"{folder}/{seed}")
            tokenizer_of(module.config.vocab_size).save_pretrained(f"{folder}/{seed}")
            made.append(
                LLM(
                    f"{folder}/{seed}",
                    dtype=str(machine.dtype).removeprefix("torch."),
                    max_model_len=length,
                    max_num_seqs=64,
                    enforce_eager=machine.device == "cpu",
                    enable_chunked_prefill=machine.device != "cpu",  # seeds
                    **({"block_size": 32, "kv_cache_memory_bytes": 1 << 30} if machine.device == "cpu" else {}),
                    **({} if machine.device == "cpu" else {"gpu_memory_utilization": 0.4}),
                )
            )
        yield made
        for llm in made:
            llm.llm_engine.engine_core.shutdown()


def compare(
    machine: Machine,
    shape: str,
    prompt: int,
    width: int,
    expansions: int,
    step: int,
    depths: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Lines of the report: a beam search by each scorer, one line a number of steps.

    Args:
        prompt: tokens of the prompt.
        width, expansions: of Beam.
        step: tokens of every step.
        depths: steps of a search, one line each.
        rounds: timed searches by each scorer, in turns.
    """
    lines = []
    with engines(shape, machine, prompt + step * max(depths) + 1) as (sampler, trained):
        policy = VLLMPolicy(sampler, stop_ids=[])
        scorers: dict[str, Any] = {"cached": VLLMImplicitPRM(trained, "policy"), "re-encoding": Reencoding(trained)}
        ids = np.random.default_rng(0).integers(11, policy.facts.vocab, prompt).tolist()
        for depth in depths:
            found: dict[str, list[ps.Result]] = {name: [] for name in scorers}

            def run(name: str, depth: int = depth, found: dict[str, list[ps.Result]] = found) -> None:
                for llm in (sampler, trained):
                    llm.reset_prefix_cache()
                found[name] += ps.search(
                    [ids],
                    policy=policy,
                    scorer=scorers[name],
                    strategy=ps.Beam(width, expansions),
                    steps=ps.StepRule(delimiter=None, max_tokens=step),
                    max_new_tokens=step * depth,
                    temperature=1.0,
                )

            seconds = paired({name: lambda name=name: run(name) for name in scorers}, rounds)
            trees = {tuple(node.token_ids for node in result.tree.nodes) for each in found.values() for result in each}
            assert len(trees) == 1, "both scorers led to the same tree: the rewards are the same"
            for name in scorers:
                timed = [result.usage for result in found[name][-rounds:]]
                lines.append(
                    {
                        "shape": shape,
                        "prompt": prompt,
                        "beams": width * expansions,
                        "step": step,
                        "steps": depth,
                        "way": name,
                        "seconds": statistics.median(seconds[name]),
                        "scorer_seconds": statistics.median(usage.seconds["scorer"] for usage in timed),
                        "policy_seconds": statistics.median(usage.seconds["policy"] for usage in timed),
                        "tokens": {
                            kind: getattr(timed[-1], f"{kind}_tokens").get("prm", 0)
                            for kind in ("encoded", "reencoded", "cached")
                        },
                    }
                )
    return lines
