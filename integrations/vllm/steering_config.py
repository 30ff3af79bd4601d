"""Settings of steering inside vLLM: the engine's `additional_config["prm_search"]`, each request's `extra_args`.

Imports no vLLM and no torch: vLLM's front end checks requests with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from prm_search.checks import beta, integer, number, strength
from prm_search.steps import StepRule

SECTION = "prm_search"
DTYPES = ("auto", "float32", "bfloat16", "float16")
REQUEST_KEYS = ("prm_alpha", "prm_max_kl", "prm_report")
_STEP_KEYS = ("delimiter", "max_tokens", "regex")


@dataclass(frozen=True)
class SteeringConfig:
    """`additional_config["prm_search"]`.

    Args:
        model: the PRM: id, folder (a pair card's too) or GGUF file; or "policy" where vLLM's own model is the PRM.
        reference: the same for the reference; "policy" where vLLM's model is it (same weights); None for what a pair
            card or adapter says.
        beta: of the rewards in the report; None for the card's, else 0.05.
        tokenizer: where the pair's is, if not beside its model.
        revision, reference_revision: of hub repositories.
        dtype: of the pair: one of DTYPES; None for that of vLLM's model.
        device: of the pair; None for vLLM's.
        capacity: tokens of KV that each of its models holds; None: see `default_capacity`.
        trust_remote_code: as in transformers.
        report: file that the rewards of requests with prm_report are appended to, a JSON object a line.
        steps: where the report's steps end: the StepRule; the delimiter is the pair card's where neither it nor a regex
            is given.

    Raises:
        ValueError: an unknown key, or a value that makes no sense; the key is named.
    """

    model: str
    reference: str | None = None
    beta: float | None = None
    tokenizer: str | None = None
    revision: str | None = None
    reference_revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    capacity: int | None = None
    trust_remote_code: bool = False
    report: str | None = None
    steps: StepRule = field(default_factory=StepRule)

    @classmethod
    def of(cls, additional_config: Any) -> SteeringConfig:
        """From vLLM's additional_config."""
        where = f'additional_config["{SECTION}"]'
        section = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
        if not isinstance(section, Mapping):
            raise ValueError(
                f'{where} is missing: the logits processor needs {{"model": ..., "reference": ...}} there '
                f"(--additional-config on the command line), got {section!r}"
            )
        known = [option.name for option in fields(cls)]
        for key in section:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
        if "model" not in section:
            raise ValueError(f'{where}: "model" is missing: the PRM, as a path or hub id, or "policy"')
        try:
            steps = _step_rule(section.get("steps"))
            made = cls(**{**section, "steps": steps})
            made._check()
            if made.report is not None and not {"delimiter", "regex"} & set(section.get("steps") or ()):
                made = made._with_card()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        return made

    def _check(self) -> None:
        for name in ("model", "reference", "tokenizer", "revision", "reference_revision", "device", "report"):
            value = getattr(self, name)
            if (value is not None or name == "model") and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}={value!r}: a non-empty string is needed")
        if self.beta is not None:
            beta("beta", self.beta)
        if self.capacity is not None:
            integer("capacity", self.capacity, 1, "a number of tokens >= 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: one of {', '.join(DTYPES)} is needed")
        if not isinstance(self.trust_remote_code, bool):
            raise ValueError(f"trust_remote_code={self.trust_remote_code!r}: true or false is needed")
        if self.model == "policy" and self.reference in (None, "policy"):
            raise ValueError(f'reference={self.reference!r}: with model="policy" the reference must be named')

    def _with_card(self) -> SteeringConfig:
        """The same with a report whose steps end as the pair's card says, if it has one that does."""
        from prm_search.scorers.implicit.card import card_delimiter

        delimiter = None if self.model == "policy" else card_delimiter(self.model)
        return self if delimiter is None else replace(self, steps=replace(self.steps, delimiter=delimiter))

    @property
    def follows_policy(self) -> bool:
        """Return True if vLLM's own logits stand for one half."""
        return "policy" in (self.model, self.reference)


def _step_rule(options: Any) -> StepRule:
    if options is None:
        return StepRule()
    if not isinstance(options, Mapping):
        raise ValueError(f"steps={options!r}: an object with {', '.join(_STEP_KEYS)} is needed")
    for key in options:
        if key not in _STEP_KEYS:
            raise ValueError(f"steps: unknown key {key!r}; known are {', '.join(_STEP_KEYS)}")
    try:
        return StepRule(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"steps: {error}") from error


def default_capacity(max_num_seqs: int, max_model_len: int) -> int:
    """Tokens of KV a model: for every request at its longest, up to 65536; always enough for one."""
    return max(max_model_len, min(max_num_seqs * max_model_len, 1 << 16))


@dataclass(frozen=True)
class RequestOptions:
    """A request's wishes, in `SamplingParams.extra_args` or HTTP's `vllm_xargs`.

    Attributes:
        alpha: prm_alpha: strength of the steering.
        max_kl: prm_max_kl: nats that KL(steered || policy) may reach at a token; inf without.
        report: prm_report: key of its record in the report; None for no record.
    """

    alpha: float
    max_kl: float = math.inf
    report: str | int | None = None

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions | None:
        """None for a request that asks for nothing, or for alpha 0 without a record.

        Raises:
            ValueError: an unknown key that begins with "prm_", or a bad value; the key is named.
        """
        options = {key: value for key, value in (extra_args or {}).items() if str(key).startswith("prm_")}
        if not options:
            return None
        for key in options:
            if key not in REQUEST_KEYS:
                raise ValueError(f"{key}: unknown; known are {', '.join(REQUEST_KEYS)}")
        alpha, bound, report = (options.get(key) for key in REQUEST_KEYS)
        try:
            if alpha is not None:
                strength("prm_alpha", alpha)
            if bound is not None:
                number("prm_max_kl", bound, "a finite number of nats > 0", lambda value: 0 < value < math.inf)
        except TypeError as error:  # vLLM answers a ValueError with HTTP 400
            raise ValueError(str(error)) from error
        if bound is not None and alpha is None:
            raise ValueError(f"prm_max_kl={bound!r} bounds prm_alpha, which is missing")
        if report is not None and not _is_key(report):
            raise ValueError(
                f"prm_report={report!r}: a non-empty string or an integer of 64 bits is needed, the record's key"
            )
        if not alpha and report is None:
            return None
        return cls(float(alpha or 0.0), math.inf if bound is None else float(bound), report)


def _is_key(value: Any) -> bool:
    """Return True if it can be a record's key: larger integers do not reach vLLM's worker."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, str) and value != ""
