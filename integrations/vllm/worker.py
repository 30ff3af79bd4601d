"""The pair inside a vLLM worker: loaded as the engine's config says, it steers whatever rows it is given.

Between the two interfaces of vLLM's logits processors, which only say which request is in which row, and `Steering`,
which knows no vLLM.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prm_search.engine.language_model import LanguageModel
from prm_search.integrations.vllm.steering_config import RequestOptions, SteeringConfig, default_capacity
from prm_search.integrations.vllm.steering_report import Report, finished
from prm_search.steering import Steering, Stream
from prm_search.tokens import TokenizerMatch, TokenText

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


@dataclass(eq=False)
class Guided:
    """A request that opted in."""

    stream: Stream
    options: RequestOptions
    params: SamplingParams

    def gone(self, room: int) -> tuple[int, str | None]:
        """Output tokens that count, and why it ended, by its tokens; see `finished`. `room`: tokens the model takes."""
        params, limit = self.params, room - len(self.stream.prompt)
        stops = {params.eos_token_id, *(params.stop_token_ids or ())} - {None}
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        return finished(self.stream.output, stops, limit)


class Guide:
    """One worker's pair and the requests that it steers.

    Args:
        vllm_config: of the engine; its additional_config["prm_search"] is the SteeringConfig.
        device: of the engine.
        biased: names of the sampling parameters whose changes to the logits were made before the processor's turn:
            with those a row is no longer the policy's own distribution.

    Raises:
        ValueError: the config is wrong, the engine has a feature that steering does not work with, or the pair has
            another vocabulary than the engine's model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, biased: Sequence[str]) -> None:
        from vllm.logger import init_logger

        self._log = init_logger("vllm.prm_search")
        self.config = SteeringConfig.of(vllm_config.additional_config)
        refuse_features(vllm_config, self.config)
        self._room = vllm_config.model_config.max_model_len
        self._biased = biased
        prm, reference, tokenizer, beta = self._load(vllm_config, device)
        self.steering = Steering(prm, reference, warn=self._log.warning)
        policy_tokenizer = _policy_tokenizer(vllm_config)
        check_vocabulary(vllm_config, policy_tokenizer, tokenizer, self.steering.vocab)
        served = os.path.realpath(vllm_config.model_config.model)
        for part, lm in (("model", prm), ("reference", reference)):
            if lm is None:
                continue
            self._reserve(lm)
            if os.path.realpath(lm.module.config._name_or_path) == served:
                self._log.info(
                    'prm_search: vLLM serves the %s itself: "%s": "policy" would run one model less', part, part
                )
        self.report: Report | None = None
        if self.config.report is not None and _first_rank(vllm_config):
            if (tokenizer or policy_tokenizer) is None:
                raise ValueError("report: steps need a tokenizer, and neither the pair nor vLLM has one")
            piece = TokenText(tokenizer or policy_tokenizer).piece
            self.report = Report(self.config.report, beta, self.config.steps, piece)
        self._silent = self.config.report is None  # say once that prm_report leads nowhere
        self._open: dict[int, Guided] = {}
        # What ends in the last step of an engine that is then left idle is written when the process ends.
        weakref.finalize(self, _end_all, self._open, self.steering, self.report, self._room)

    def _load(
        self, vllm_config: VllmConfig, device: torch.device
    ) -> tuple[LanguageModel | None, LanguageModel | None, Any, float]:
        from prm_search.models.loading import load
        from prm_search.scorers.implicit.implicit_prm import ImplicitPRM
        from prm_search.scorers.pair import BETA

        config, scheduler = self.config, vllm_config.scheduler_config
        capacity = config.capacity or default_capacity(scheduler.max_num_seqs, self._room)
        dtype = config.dtype or str(vllm_config.model_config.dtype).removeprefix("torch.")
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
        if config.model == "policy":
            named: Any = config.reference
            other = load(
                named, revision=config.reference_revision, tokenizer=config.tokenizer, capacity=capacity, **options
            )
            parts: list[LanguageModel | None] = [None, other.lm]
            tokenizer, beta = other.tokenizer, config.beta or BETA
        else:
            pair = ImplicitPRM.from_pretrained(
                config.model, config.reference, beta=config.beta, tokenizer=config.tokenizer, capacity=capacity,
                revision=config.revision, reference_revision=config.reference_revision, **options,
            )  # fmt: skip
            parts, tokenizer, beta = [pair.prm, pair.reference], pair.tokenizer, pair.beta
        where = torch.device(config.device) if config.device is not None else device
        for lm in parts:
            if lm is not None:
                lm.module.to(where)
        return parts[0], parts[1], tokenizer, beta

    def _reserve(self, lm: LanguageModel) -> None:
        """Make the KV pools now, while vLLM still measures how much memory is left for its own."""
        root = lm.tree.root([0])
        try:
            lm.extend([root], [()], want="log_softmax")
        finally:
            lm.tree.release(root)
        self._log.info("prm_search: %s on %s, %d MiB for KV of %d tokens", lm.id, lm.device, lm.pool.bytes() >> 20,
                       lm.tree.capacity)  # fmt: skip

    # --- requests ----------------------------------------------------------------------------------------------------

    def options(self, params: SamplingParams) -> RequestOptions | None:
        """Return what a request asks for; None for nothing."""
        try:
            return RequestOptions.of(params.extra_args)
        except ValueError as error:  # the front end refuses these, if it is asked
            self._log.warning("prm_search: a request goes on unguided: %s", error)
            return None

    def begin(
        self, options: RequestOptions, params: SamplingParams, prompt: Sequence[int] | None, output: list[int]
    ) -> Guided:
        """Take a request on. `output` is the list that its tokens are appended to."""
        observed = options.report is not None and self.report is not None
        stream = self.steering.open(prompt or (), output, alpha=options.alpha, max_kl=options.max_kl, observed=observed)
        if options.report is not None and self._silent:
            self._silent = False
            self._log.warning("prm_report is given, but additional_config names no report: no rewards are written")
        if self.config.follows_policy and (changed := [name for name in self._biased if _changes(params, name)]):
            self.steering.give_up(
                stream, f"{changed[0]} changes the policy's logits before they can stand for a half of the pair"
            )
        made = Guided(stream, options, params)
        self._open[id(made)] = made
        return made

    def end(self, guided: Guided) -> None:
        """A request has left the batch: free its KV and write its record."""
        self._open.pop(id(guided), None)
        self.steering.close(guided.stream)
        try:
            _write(guided, self.report, self._room)
        except Exception as error:  # a full disk must not end the engine
            self._log.warning("prm_search: a record could not be written: %s", error)

    def over(self, guided: Guided) -> bool:
        """Return True if a request has ended, as far as its tokens tell."""
        return guided.gone(self._room)[1] is not None

    def steer(self, logits: torch.Tensor, rows: Callable[[], Mapping[int, Guided]]) -> None:
        """Steer the rows of these requests; see Steering.steer. Never raises: that would end the engine."""
        try:
            self.steering.steer(logits, {row: guided.stream for row, guided in rows().items()})
        except Exception as error:
            for guided in self._open.values():
                self.give_up(guided, f"{type(error).__name__}: {error}")

    def give_up(self, guided: Guided, reason: str) -> None:
        """Let a request go on unguided."""
        self.steering.give_up(guided.stream, reason)


def refuse_features(vllm_config: VllmConfig, config: SteeringConfig) -> None:
    """Raise ValueError for features of an engine that steering does not work with."""
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config: steering has no rows for draft tokens; serve without it")
    if getattr(vllm_config, "diffusion_config", None) is not None:
        raise ValueError("diffusion models have no next token to steer")
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: every stage would load the pair; use tensor "
            "parallelism"
        )
    if config.follows_policy and vllm_config.lora_config is not None:
        raise ValueError(
            "enable_lora: a request's adapter makes another model of the policy, which then is no half of the pair: "
            'name the pair\'s models instead of "policy"'
        )


def check_vocabulary(vllm_config: VllmConfig, policy: Any, pair: Any, tokens: int) -> None:
    """Raise ValueError unless token ids mean the same to vLLM's model and to the pair.

    Args:
        vllm_config: of the engine.
        policy, pair: tokenizers; where one is missing the sizes of the vocabularies must agree.
        tokens: that all models of the pair know.
    """
    name = vllm_config.model_config.model
    if policy is not None and pair is not None:
        if not TokenizerMatch.of(pair, policy).tokens:
            raise ValueError(
                f"the pair has another vocabulary than {name!r}, the model that vLLM serves: token steering adds "
                "log-ratios token by token, so both need one tokenizer"
            )
        if len(policy.get_vocab()) > tokens:
            raise ValueError(f"{name!r} has {len(policy.get_vocab())} tokens, the pair's models only {tokens}")
    elif vllm_config.model_config.get_vocab_size() != tokens:
        raise ValueError(
            f"{name!r} has {vllm_config.model_config.get_vocab_size()} tokens, the pair {tokens}, and without a "
            "tokenizer of either nothing else tells whether they mean the same"
        )


def _policy_tokenizer(vllm_config: VllmConfig) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(vllm_config.model_config)


def _first_rank(vllm_config: VllmConfig) -> bool:
    """One of the tensor-parallel copies writes the report; all of them compute the same."""
    parallel = vllm_config.parallel_config
    return parallel.rank % parallel.tensor_parallel_size == 0


def _changes(params: SamplingParams, name: str) -> bool:
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    value = getattr(params, name, None)
    return bool(value) if name not in neutral else value != neutral[name]


def _write(guided: Guided, report: Report | None, room: int) -> None:
    if report is not None and guided.options.report is not None:
        report.write(guided.options.report, guided.stream, *guided.gone(room))


def _end_all(requests: dict[int, Guided], steering: Steering, report: Report | None, room: int) -> None:
    """Write what was never told to be over."""
    for guided in list(requests.values()):
        with contextlib.suppress(Exception):
            steering.close(guided.stream)
            _write(guided, report, room)
