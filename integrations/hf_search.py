"""The search behind generate: its model, its loop with a streamer, and its responses as rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from prm_search.driver.loop import Job, SearchLoop
from prm_search.driver.result import Event, Result
from prm_search.driver.search_settings import SearchSettings
from prm_search.engine.adapters import tuner_layers, unwrap
from prm_search.engine.language_model import LanguageModel
from prm_search.guidance import PRMGuidance
from prm_search.integrations.hf_call import Call
from prm_search.integrations.hf_rows import RowIds
from prm_search.policies.hf import HFPolicy
from prm_search.search import encode_all
from prm_search.tree import Node, Prompt

logger = logging.getLogger(__name__)


def language_model(model: Any) -> LanguageModel:
    """The LanguageModel of what a transformers model computes at the moment: its adapters if they are switched on.

    Raises:
        ValueError: several adapters are active at once, or see LanguageModel.of.
    """
    layers = tuner_layers(unwrap(model))
    if not layers:
        return LanguageModel.of(model)
    active = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    if len(active) > 1 or len(next(iter(active))) > 1:
        raise ValueError(f"active adapters {sorted(active)}: generate can search with one for all layers, or none")
    names = active.pop()
    return LanguageModel.of(unwrap(model), adapter=names[0] if names else None)


def search(
    prompts: Sequence[Prompt],
    policy: HFPolicy,
    guidance: PRMGuidance,
    settings: SearchSettings,
    ids: RowIds,
    streamer: Any,
) -> list[Result]:
    """A Result a prompt. `ids` learns the trees; `streamer` gets the steps of the one prompt as they are settled."""
    stream = None if streamer is None else _StepStream(streamer)
    try:
        with SearchLoop(policy, guidance.pair, guidance.prover) as loop:
            if stream is not None:
                loop.models.on_event = partial(stream.noticed, loop)
            encoded = encode_all(prompts, loop.models.encode)
            jobs = [Job(prompt, settings, occurrence, number) for number, (prompt, occurrence) in enumerate(encoded)]
            ended = loop.run(jobs, len(jobs), begun=lambda job, tree: ids.add(tree, job.place))
            results = {job.place: result for job, result in ended}
            for result in results.values():
                loop.models.read_batch(result.usage)
    except BaseException:
        if stream is not None:
            with suppress(Exception):  # who reads the stream shall not wait for ever; the first error is the one to see
                streamer.end()
        raise
    if stream is not None:
        streamer.end()
    return [results[job.place] for job in jobs]


def laid_out(call: Call, results: Sequence[Result], pad: int | None) -> torch.Tensor:
    """[prompts * returned, length] ids: prompts as generate had them, responses padded on the right.

    A search that found fewer responses than that has them repeated, in its candidates too.
    """
    responses: list[list[int]] = []
    for number, result in enumerate(results):
        distinct_count = len(result.candidates)
        if 0 < distinct_count < call.returned:
            logger.warning(
                "num_return_sequences=%d, but the search for prompt %d found %d different responses: they are repeated",
                call.returned, number, distinct_count,
            )  # fmt: skip
            result.candidates = [result.candidates[i % distinct_count] for i in range(call.returned)]
        responses += [node.path_ids() for node in result.candidates[: call.returned]] or [[]] * call.returned
    longest = max(map(len, responses))
    padded = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in responses], dtype=torch.long)
    prompts = call.input_ids.repeat_interleave(call.returned, dim=0)
    return torch.cat([prompts, padded.reshape(len(responses), longest).to(prompts)], dim=1)


class _StepStream:
    """Puts the steps of an answer, each once."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._sent = 0

    def noticed(self, loop: SearchLoop, event: Event) -> None:
        """Put what an event settles; the search's end settles the rest."""
        if event.result is None:
            self._put(loop.committed(event.tree))
        elif event.result.node is not None:
            self._put(event.result.node.path())

    def _put(self, steps: Sequence[Node]) -> None:
        for step in steps[self._sent :]:
            self._streamer.put(torch.tensor([step.token_ids]))
            self._sent += 1
