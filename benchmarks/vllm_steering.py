"""Steering inside vLLM: milliseconds an engine step, unguided, steered, and by a processor that batches nothing."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from common import Machine, model, paired, ratio
from transformers import AutoModelForCausalLM, DynamicCache
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor

from prm_search.integrations.vllm.logits_processor import ImplicitPRMLogitsProcessor


class Unbatched(AdapterLogitsProcessor):
    """The baseline with vLLM's adapter for processors of single requests: two transformers models and a DynamicCache
    each for every request, fed with its new tokens."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        section = vllm_config.additional_config["prm_search"]
        self.models = [
            AutoModelForCausalLM.from_pretrained(section[part], dtype=vllm_config.model_config.dtype).to(device).eval()
            for part in ("model", "reference")
        ]

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        return _Request(self.models, params.extra_args["prm_alpha"]) if params.extra_args else None


class _Request:
    def __init__(self, models: Sequence[Any], alpha: float) -> None:
        self.models, self.alpha, self.seen = models, alpha, 0
        self.caches = [DynamicCache(config=each.config) for each in models]

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        ids = [*prompt, *output][self.seen :]
        self.seen += len(ids)
        given = torch.tensor([ids], device=logits.device)
        prm, reference = (
            each(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
            for each, cache in zip(self.models, self.caches, strict=True)
        )
        return logits + self.alpha * (prm - reference)


class Switch(LogitsProcessor):
    """Several processors in one engine, one of them at work, so that each takes its turn in the same run."""

    at_work: ClassVar[str | None] = None

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        section = vllm_config.additional_config["prm_search"]
        given = device, is_pin_memory
        self.each: dict[str, LogitsProcessor] = {"ours": ImplicitPRMLogitsProcessor(vllm_config, *given)}
        vllm_config.additional_config["prm_search"] = section | {"reference": "policy"}
        self.each["ours, policy = reference"] = ImplicitPRMLogitsProcessor(vllm_config, *given)
        vllm_config.additional_config["prm_search"] = section
        self.each["un-batched"] = Unbatched(vllm_config, *given)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        # To those that rest, a request in a row says only that whoever was there before has left.
        rest = batch_update and replace(
            batch_update, added=[], removed=[*batch_update.removed, *(index for index, *_ in batch_update.added)]
        )
        for name, each in self.each.items():
            each.update_state(batch_update if name == self.at_work else rest)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.at_work is None else self.each[self.at_work].apply(logits)


WAYS = ("unguided", "ours", "ours, policy = reference", "un-batched")


@contextmanager
def engine(shape: str, machine: Machine, length: int, rows: int) -> Iterator[Any]:
    """A policy that is the reference too, and a PRM, of a shape with random weights, in an engine of this process."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in (1, 2):
            model(shape, seed, machine).save_pretrained(f"{folder}/{seed}")
        llm = LLM(
            f"{folder}/1", skip_tokenizer_init=True, dtype=str(machine.dtype).removeprefix("torch."),
            max_model_len=length, max_num_seqs=rows, max_num_batched_tokens=max(2048, rows * 64),
            enforce_eager=machine.device == "cpu",
            disable_log_stats=True, logits_processors=[Switch], enable_prefix_caching=False,
            additional_config={"prm_search": {"model": f"{folder}/2", "reference": f"{folder}/1"}},
        )  # fmt: skip
        yield llm


def compare(
    machine: Machine, shape: str, prompt: int, batches: Sequence[int], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Lines of the report, one a batch size: milliseconds an engine step that samples a token for every row.

    The prompt's share is taken out: what is timed is a response of `tokens + 1` tokens less one of a single token.
    """
    with engine(shape, machine, prompt + tokens + 2, max(batches)) as llm:
        return [_line(llm, machine, shape, prompt, rows, tokens, repeats) for rows in batches]


def _line(llm: Any, machine: Machine, shape: str, prompt: int, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def run(way: str, length: int) -> None:
        Switch.at_work = None if way == "unguided" else way
        # New prompts each time: those of the run before are still held when this one begins, and would be free.
        heads = torch.randint(11, 8000, (rows, prompt), generator=draw).tolist()
        extra = None if way == "unguided" else {"prm_alpha": 1.0}
        wants = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra)
        llm.generate([{"prompt_token_ids": head} for head in heads], wants, use_tqdm=False)

    seconds = paired(
        {f"{way} {length}": partial(run, way, length) for way in WAYS for length in (1, tokens + 1)}, repeats
    )
    each = {
        way: [
            (long - short) / tokens
            for long, short in zip(seconds[f"{way} {tokens + 1}"], seconds[f"{way} 1"], strict=True)
        ]
        for way in WAYS
    }
    return {
        "shape": shape,
        "prompt": prompt,
        "rows": rows,
        "tokens": tokens,
        "ms": {way: 1e3 * statistics.median(values) for way, values in each.items()},
        "over_unguided": {way: ratio(values, each["unguided"]) for way, values in each.items()},
        "unbatched_over_ours": ratio(each["un-batched"], each["ours"]),
    }
