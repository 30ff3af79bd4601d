"""Token steering inside vLLM: logits += alpha * (log pi_phi - log pi_ref), before temperature, for requests that ask.

    LLM(..., logits_processors=["prm_search.integrations.vllm.logits_processor:ImplicitPRMLogitsProcessor"],
        additional_config={"prm_search": {"model": ..., "reference": ...}})
    SamplingParams(extra_args={"prm_alpha": 1.0})

One class for both of vLLM's interfaces. The front end imports this module too, to check requests: the pair is loaded in
the workers only.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from prm_search.integrations.vllm.beam_search import refuse_steered_beams
from prm_search.integrations.vllm.steering_config import RequestOptions

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    from prm_search.integrations.vllm.runner_rows import BatchRows, Slots


class ImplicitPRMLogitsProcessor(V1Processor, V2Processor):
    """Steers requests by an implicit PRM. V1 constructs it with (config, device, is_pin_memory) and calls update_state
    and apply(logits); Model Runner V2 with (config, request states), and calls add_request, apply_staged_writes and
    apply(logits, context).

    What it is configured with, and what a request may ask for: see SteeringConfig and RequestOptions.

    Raises:
        ValueError: see Guide; or V1 schedules asynchronously and the class was loaded by an entry point, where vLLM
            does not tell it the sampled tokens.
    """

    def __init__(self, vllm_config: VllmConfig, *arguments: Any) -> None:
        from prm_search.integrations.vllm.runner_rows import BIASED_V1, BIASED_V2, BatchRows, Slots
        from prm_search.integrations.vllm.worker import Guide

        self._batch: BatchRows | None = None
        self._slots: Slots | None = None
        if len(arguments) == 1:
            states = arguments[0]
            self._slots = Slots(Guide(vllm_config, states.device, BIASED_V2), states)
        else:
            if vllm_config.scheduler_config.async_scheduling and not vllm_config.model_config.logits_processors:
                raise ValueError(
                    "with async scheduling vLLM tells sampled tokens only to processors that are given by "
                    "logits_processors= or --logits-processors; an entry point does not do"
                )
            self._batch = BatchRows(Guide(vllm_config, arguments[0], BIASED_V1))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a request's prm_* arguments. Raises ValueError, which HTTP answers with 400."""
        RequestOptions.of(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """V1: steering changes greedy sampling too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: before each step, what has changed in the batch."""
        assert self._batch is not None
        self._batch.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot; whether its logits are to be changed."""
        assert self._slots is not None
        return self._slots.add(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """V2: a step begins."""
        assert self._slots is not None
        self._slots.step()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Steer the rows of requests that opted in, in place.

        Args:
            logits: [rows, V] fp32.
            ctx: V2: which slots the rows belong to.
        """
        if self._batch is not None and self._batch.requests:
            self._batch.guide.steer(logits, self._batch.rows)
        elif self._slots is not None and self._slots.slots:
            self._slots.guide.steer(logits, partial(self._slots.rows, ctx))
        return logits


refuse_steered_beams()  # the front end loads this module before it takes requests
