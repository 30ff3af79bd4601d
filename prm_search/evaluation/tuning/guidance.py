"""A config as plain values, and as a guidance file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...protocols import Sampling
from ...steps import StepRule
from ...strategies import BestOfN, named_strategy, plain_strategy
from ..plan import OWN
from .trials import Config


def plain_config(config: Config) -> dict[str, Any]:
    """A config as plain values, which `read_config` reads."""
    return {
        "strategy": plain_strategy(config.strategy), "scorer": config.scorer, "value": config.value,
        "select": config.select, "weight_temperature": config.weight_temperature, "tokens": config.tokens,
    }  # fmt: skip


def read_config(plain: Mapping[str, Any]) -> Config:
    """The config of plain values."""
    return Config(**{**plain, "strategy": named_strategy(plain["strategy"])})


def guidance(
    config: Config, sampling: Sampling, *, answer: str | None, models: Mapping[str, Any], seconds: float | None = None
) -> dict[str, Any]:
    """The content of a guidance file; see driver.guidance_file.

    Args:
        config: what to do.
        sampling: how tokens are drawn.
        answer: finds the answers that vote; a name, of a function too (see answers.functions), or None.
        models: names of the models, as a command line has them.
        seconds: of a problem at most.
    """
    steps = {name: _listed(getattr(sampling.steps, name)) for name in _own(StepRule)}
    changed = {name: value for name, value in steps.items() if value != _listed(getattr(StepRule(), name))}
    # n whole samples are as long as they are; a budget in tokens would cut the longer half of them.
    tokens = None if isinstance(config.strategy, BestOfN) else config.tokens
    budget = {name: limit for name, limit in (("tokens", tokens), ("seconds", seconds)) if limit is not None}
    content: dict[str, Any] = {
        **models,
        "strategy": plain_strategy(config.strategy),
        "value": None if config.value == OWN else config.value,
        "select": config.select,
        "answer": answer,
        "weight_temperature": config.weight_temperature if config.select == "weighted" else None,
        "steps": changed or None,
        "budget": budget or None,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "max_new_tokens": sampling.max_new_tokens,
    }
    return {name: value for name, value in content.items() if value is not None}


def write_guidance(path: Path, content: Mapping[str, Any], note: str) -> None:
    """Write a guidance file. `note` stands at its head as a comment."""
    import yaml

    comment = "".join(f"# {line}\n" for line in note.splitlines())
    body = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, default_flow_style=None)
    path.write_text(f"{comment}{body}", encoding="utf-8")


def _own(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
