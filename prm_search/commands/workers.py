"""`--ray`, `--workers`, `--gpus-per-worker`: a command's work on the workers of a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..models.placement import DEMO
from . import BadInput, options
from .groups import Engine, Pair, Place
from .progress import Bar
from .records import Item

if TYPE_CHECKING:
    from ..distributed import Cluster, Failure

_RAY = "Many machines"
_FLAGS = {"address": "--ray", "workers": "--workers", "gpus_per_worker": "--gpus-per-worker"}
_MODELS = ("pair", "prm", "reference", "scorer")  # fields that may name folders

Group = TypeVar("Group")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of a cluster, in place of this process. Raises BadInput for numbers of workers without --ray."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Work on a Ray cluster: HOST:PORT, auto, or without an address one on this machine for this command.",
            rich_help_panel=_RAY,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(help="Default: as many as there are GPUs for, else one a machine.", rich_help_panel=_RAY),
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(help="May be a fraction. Default: 1 where the cluster has GPUs, else 0.", rich_help_panel=_RAY),
    ] = None

    def __post_init__(self) -> None:
        if self.ray is None and (self.workers is not None or self.gpus_per_worker is not None):
            raise BadInput(f"--{'workers' if self.workers is not None else 'gpus-per-worker'} needs --ray")
        if self.workers is not None:
            options.at_least("--workers", self.workers)

    @contextmanager
    def open(self, bar: Bar) -> Iterator[Cluster]:
        """The cluster; what becomes of its workers is said beside the bar. Raises BadInput naming the option."""
        from ..distributed import Cluster

        with options.named(_FLAGS):
            cluster = Cluster(
                None if self.ray == "local" else self.ray, workers=self.workers, gpus_per_worker=self.gpus_per_worker,
                notice=lambda line: bar.say(f"prm-search: {line}"),
            )  # fmt: skip
            cluster.__enter__()
        try:
            bar.watch(cluster)
            yield cluster
        finally:
            cluster.__exit__(None, None, None)


def place_of(place: Place, cluster: Cluster, engine: str = "hf") -> Place:
    """The device of a worker's models. Raises BadInput for a GPU that its worker does not have."""
    if cluster.gpus_per_worker or engine != "hf":
        return place
    if place.device not in ("auto", "cpu"):
        raise BadInput(f"--device {place.device} needs --gpus-per-worker: these workers have no GPU")
    return replace(place, device="cpu")


def load_policy(engine: Engine, name: str, place: Place) -> Any:
    """The policy of that name, in a worker."""
    from .models import quiet

    quiet()
    return engine.load(name, place)


def load_scorer(scorer: Pair, place: Place) -> Any:
    """The reward model of a group of options, in a worker."""
    from .models import quiet

    quiet()
    return scorer.load(place)


def absolute(name: str) -> str:
    """A model's name as workers, which run in other folders, can use it: folders and files by their whole path."""
    return os.path.abspath(name) if name not in (DEMO, "policy") and os.path.exists(name) else name


def absolutes(group: Group) -> Group:
    """A group of options with the whole paths of its models."""
    named = {field.name for field in fields(group)} & set(_MODELS)  # type: ignore[arg-type]
    paths = {name: absolute(value) for name in named if (value := getattr(group, name)) is not None}
    return replace(group, **paths)  # type: ignore[type-var]


def sent_whole(*functions: object) -> None:
    """Have functions of the user's own modules sent to workers as code, since those cannot import them."""
    from ray import cloudpickle

    for function in functions:
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        path = getattr(module, "__file__", None) or ""
        if module is not None and path.startswith(os.getcwd() + os.sep) and "site-packages" not in path:
            cloudpickle.register_pickle_by_value(module)


@dataclass
class Failures:
    """Problems that workers gave up, said as that happens and once more at the end.

    Attributes:
        items: the problems.
        bar: beside which they are said.
        places: of those that failed.
    """

    items: Sequence[Item]
    bar: Bar
    places: list[int] = field(default_factory=list)

    def __call__(self, failure: Failure) -> None:
        """Take note of one."""
        self.lost(failure.place, failure.reason)

    def lost(self, place: int, reason: str) -> None:
        """Take note of a problem of which something failed, once, and say why."""
        if place not in self.places:
            self.places.append(place)
        self.bar.say(f"prm-search: {self.items[place].where} failed: {reason}")

    @property
    def names(self) -> list[str]:
        """Return what they are called, in order."""
        return [self.items[place].where for place in sorted(self.places)]

    def check(self) -> None:
        """Raises BadInput where there are some."""
        if self.places:
            raise BadInput(f"{len(self.places)} of {len(self.items)} failed: {'; '.join(self.names)}")
