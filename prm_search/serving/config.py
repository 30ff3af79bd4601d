"""A server's settings of its pair, its steps and its limits: by `prm-search serve`, or by vLLM's own command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..checks import beta, flag, non_empty
from ..driver.guidance_file import GuidanceFile, guidance_of
from ..models.placement import DEMO, shipped
from ..scorers.kinds import check_kind
from ..steps import StepRule
from .limits import Limits

SECTION = "prm_search_serve"  # of vLLM's additional_config
VARIABLE = "PRM_SEARCH_SERVE"  # environment variable that has the same as JSON and goes before it


@dataclass(frozen=True)
class ServeConfig:
    """Everything about a server but its policy.

    Args:
        pair: folder or hub id with a pair card, or "demo"; or else:
        prm, reference: the two models, as ImplicitPRM.from_pretrained takes them; behind vLLM also URLs of vLLM
            servers, "http://127.0.0.1:8001" or with a model's name "http://127.0.0.1:8001#name".
        scorer: or else a reward model of any kind, as load_scorer takes it; behind vLLM also the URL of a server.
        format: of the scorer; None to find out.
        beta: of the rewards; None for the card's, else 0.05.
        device, dtype: of the pair.
        steps: the StepRule of requests that give none; `of` ends its steps as the pair's card says where it names
            neither a delimiter nor a regex.
        limits: see Limits.
        ui: serve the page /ui.
        guidance: content of a guidance file (see driver.guidance_file), by which requests are searched that bring no
            prm_guidance, and those whose strategy is "tuned"; None for none.
    """

    pair: str | None = None
    prm: str | None = None
    reference: str | None = None
    beta: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    steps: StepRule = field(default_factory=StepRule)
    limits: Limits = field(default_factory=Limits)
    scorer: str | None = None
    format: str | None = None
    ui: bool = True
    guidance: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if [self.pair, self.prm, self.scorer].count(None) != 2:
            raise ValueError("one of pair and prm, or scorer, is needed")
        if self.format is not None:
            check_kind("format", self.format)
            if self.scorer is None:
                raise ValueError(f"format={self.format!r} is of a scorer, and there is none")
        if self.scorer is not None and (self.reference is not None or self.beta is not None):
            raise ValueError("scorer names a reward model by itself: reference and beta are for prm and pair")
        if self.pair is not None and self.reference is not None:
            raise ValueError(f"reference={self.reference!r}: the pair names both models; reference is for prm")
        for name in ("pair", "prm", "scorer", "reference", "device", "dtype"):
            if getattr(self, name) is not None or name in ("device", "dtype"):
                non_empty(name, getattr(self, name))
        if self.beta is not None:
            beta("beta", self.beta)
        flag("ui", self.ui)
        self.tuned()

    def tuned(self) -> GuidanceFile | None:
        """The guidance that requests without one get. Raises ValueError where it makes no sense."""
        return None if self.guidance is None else guidance_of(self.guidance, "guidance")

    @classmethod
    def of(cls, settings: Any) -> ServeConfig:
        """From plain values, as JSON has them.

        Raises:
            ValueError: a key is unknown, or a value makes no sense; which is said.
        """
        try:
            made: ServeConfig = _make(cls, settings, "", steps=StepRule, limits=Limits)
            return made if {"delimiter", "regex"} & set(settings.get("steps", ())) else made._with_card()
        except TypeError as error:
            raise ValueError(str(error)) from error

    def _with_card(self) -> ServeConfig:
        """The same with steps that end as the pair's card says, if it has one that does."""
        from ..scorers.implicit.card import card_delimiter

        given = self.pair or self.prm or self.scorer
        name = shipped() if given == DEMO and self.prm is None else given
        delimiter = None if str(name).startswith(("http://", "https://")) else card_delimiter(str(name))
        return self if delimiter is None else replace(self, steps=replace(self.steps, delimiter=delimiter))

    @classmethod
    def find(cls, environment: Mapping[str, str], additional_config: Any) -> ServeConfig:
        """For a vLLM server: from its environment, else from its additional_config.

        Raises:
            ValueError: neither has it, or see `of`; where it stood is said.
        """
        where = f"${VARIABLE}" if VARIABLE in environment else f"additional_config[{SECTION!r}]"
        try:
            if VARIABLE in environment:
                return cls.of(json.loads(environment[VARIABLE]))
            section = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
            if section is None:
                raise ValueError('missing: {"pair": ...}, {"scorer": ...} or {"prm": ..., "reference": ...} is needed')
            return cls.of(section)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def json(self) -> str:
        """Return what `of` reads."""
        plain = asdict(self)
        names = ("delimiter", "max_tokens", "regex", "confidence", "confidence_of")
        plain["steps"] = {name: plain["steps"][name] for name in names}
        return json.dumps(plain)


def _make(kind: type[Any], mapping: Any, where: str, **parts: type[Any]) -> Any:
    """A dataclass from a mapping of its fields, of which `parts` are dataclasses themselves."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where or 'the configuration'} must be an object, got {mapping!r:.80}")
    known = [option.name for option in fields(kind) if option.init]
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where}{key} is unknown; known are {', '.join(known)}")
    values = {key: _make(parts[key], value, f"{key}.") if key in parts else value for key, value in mapping.items()}
    return kind(**values)
