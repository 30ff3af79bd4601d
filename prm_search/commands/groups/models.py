"""Options that name models: device, engine, policy, pair, scorer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .. import BadInput, options
from ..endpoint import is_endpoint
from ..options import (
    ADVANCED,
    FORMAT_HELP,
    MODELS,
    OPTIONS_HELP,
    PAIR_HELP,
    POLICY_HELP,
    SCORER_HELP,
    URL_HELP,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """The device and the dtype of models."""

    device: Annotated[
        str, typer.Option(help="Of all models: auto, cpu, cuda, cuda:1 ...", rich_help_panel=ADVANCED)
    ] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=ADVANCED)] = "auto"

    def options(self) -> dict[str, Any]:
        """As the functions of commands.models take them."""
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine that runs the policy. Raises BadInput for an unknown engine, or options that it does not have."""

    engine: Annotated[
        str, typer.Option(help="What runs the policy: hf, this package's own, or vllm.", rich_help_panel=MODELS)
    ] = "hf"
    engine_options: Annotated[
        str | None,
        typer.Option(help=OPTIONS_HELP, metavar="JSON", rich_help_panel=ADVANCED),
    ] = None
    base_url: Annotated[str | None, typer.Option(help=URL_HELP, metavar="URL", rich_help_panel=MODELS)] = None

    def __post_init__(self) -> None:
        self.arguments()
        if self.base_url is not None and not self.remote:
            raise BadInput("--base-url needs --policy openai:MODEL")

    @property
    def remote(self) -> bool:
        """Return True if the policy is behind a server."""
        return is_endpoint(getattr(self, "policy", None))

    def arguments(self) -> dict[str, Any]:
        """Further arguments of the engine."""
        return options.engine_options(self.engine, self.engine_options, endpoint=self.remote)

    def names(self) -> tuple[str, ...]:
        """Return what a record's key says of an engine that is not the package's own."""
        if self.engine == "hf" and not self.remote:
            return ()
        where = (self.base_url or "",) if self.remote else (self.engine,)
        return (*where, json.dumps(self.arguments(), sort_keys=True))

    def load(self, name: str, place: Place) -> Any:
        """The policy of this name, ready to sample. Raises as models.load_policy does."""
        from ..models import load_policy

        return load_policy(name, self.engine, options=self.arguments(), base_url=self.base_url, **place.options())


@dataclass(frozen=True, kw_only=True)
class Policy(Engine):
    """The model that samples."""

    policy: Annotated[str, typer.Option(help=POLICY_HELP, rich_help_panel=MODELS)]


@dataclass(frozen=True, kw_only=True)
class MaybePolicy(Engine):
    """The model that samples, where there is one."""

    policy: Annotated[str | None, typer.Option(help=POLICY_HELP, rich_help_panel=MODELS)] = None


@dataclass(frozen=True, kw_only=True)
class TwoModels:
    """A pair by its two models."""

    prm: Annotated[
        str | None,
        typer.Option(help="The reward LM: hub id, folder, PEFT adapter or .gguf file.", rich_help_panel=MODELS),
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(help="With --prm: the model that it was initialised from.", rich_help_panel=MODELS),
    ] = None
    beta: Annotated[
        float | None,
        typer.Option(help="Scale of the rewards. Default: the card's, else 0.05.", rich_help_panel=ADVANCED),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Pair(TwoModels):
    """One pair, by its card or by its two models. Raises BadInput where it is said in two ways."""

    pair: Annotated[str | None, typer.Option(help=PAIR_HELP, rich_help_panel=MODELS)] = None

    def __post_init__(self) -> None:
        options.check_models(self.pair, self.prm, self.reference, needed=False)

    def need(self) -> None:
        """Raises BadInput where there is none."""
        options.check_models(self.pair, self.prm, self.reference, needed=True)

    @property
    def named(self) -> bool:
        """Return True if there is one."""
        return self.pair is not None or self.prm is not None

    @property
    def title(self) -> str:
        """Return what pages and reports call it."""
        return self.pair or f"{self.prm} against {self.reference or 'its base'}"

    def load(self, place: Place) -> Any:
        """The pair, ready to score. Raises as models.load_pair does."""
        from ..models import load_pair

        return load_pair(self.pair, self.prm, self.reference, beta=self.beta, **place.options())


@dataclass(frozen=True, kw_only=True)
class Scorer(Pair):
    """One reward model: a pair, or one of another kind. Raises BadInput where it is said in two ways."""

    scorer: Annotated[str | None, typer.Option(help=SCORER_HELP, rich_help_panel=MODELS)] = None
    prm_format: Annotated[str | None, typer.Option(help=FORMAT_HELP, rich_help_panel=MODELS, show_default="auto")] = (
        None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        options.check_scorer(self.scorer, self.prm_format)
        if self.scorer is not None and (self.named_pair or self.reference is not None or self.beta is not None):
            raise BadInput("--scorer names a reward model by itself: give it, or a pair with its options")

    def need(self) -> None:
        """Raises BadInput where there is none."""
        if self.scorer is None:
            super().need()

    @property
    def named_pair(self) -> bool:
        """Return True if it is said by the options of a pair."""
        return self.pair is not None or self.prm is not None

    @property
    def named(self) -> bool:
        """Return True if there is one."""
        return self.scorer is not None or self.named_pair

    @property
    def card(self) -> str | None:
        """Return what may hold a pair card."""
        return self.pair if self.scorer is None else self.scorer

    @property
    def title(self) -> str:
        """Return what pages and reports call it."""
        return super().title if self.scorer is None else self.scorer

    def key(self) -> tuple[object, ...]:
        """Return what a record's key says of it."""
        pair = (self.pair, self.prm, self.reference, self.beta)
        return pair if self.scorer is None else (*pair, self.scorer, self.prm_format)

    def about(self) -> dict[str, object]:
        """Return what reports say of it."""
        if self.scorer is not None:
            return {"scorer": self.scorer, "format": self.prm_format}
        return {"pair": self.pair or self.prm, "reference": self.reference, "beta": self.beta}

    def load(self, place: Place) -> Any:
        """The reward model, ready to score. Raises as models.load_scorer and models.load_pair do."""
        from ..models import load_scorer

        if self.scorer is None:
            return super().load(place)
        return load_scorer(self.scorer, self.prm_format, **place.options())
