"""Models by name: what `--policy`, `--scorer`, `--pair`, `--prm` and `--reference` mean."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ..models.placement import DEMO as DEMO, placement, shipped
from ..scorers.kinds import AUTO
from . import BadInput
from .endpoint import is_endpoint, load_endpoint
from .render import console, waiting

if TYPE_CHECKING:
    from ..scorers.base import ScorerBase
    from ..scorers.implicit.implicit_prm import ImplicitPRM

GGUF_NOTE = (
    "its weights are dequantised, which takes a minute or two. To do that once: AutoModelForCausalLM and AutoTokenizer"
    ".from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW), and name NEW"
)


def quiet() -> None:
    """Keep other libraries' advice off the screen, progress bars off what is no screen, and warnings to one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):
        print(f"prm-search: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def load_policy(
    name: str,
    engine: str = "hf",
    *,
    device: str = "auto",
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
    base_url: str | None = None,
) -> Any:
    """The policy of that name, or the demo's: an HFPolicy, a VLLMPolicy or an OpenAIPolicy.

    Args:
        name: as `--policy` has it.
        engine: "hf", this package's own, or "vllm".
        device, dtype: of the model.
        options: further arguments of vllm.LLM, or of OpenAIPolicy.
        base_url: of a model behind a server.

    Raises:
        BadInput: dtype is unknown, the device is not there, or a device is named for vLLM, which has its own way; or
            see endpoint.load_endpoint.
        ImportError, OSError, ValueError: see HFPolicy.from_pretrained, OpenAIPolicy and
            integrations.vllm.load.load_policy.
    """
    if is_endpoint(name):
        return load_endpoint(name, base_url, options or {})
    model = str(shipped() / "policy") if name == DEMO else name
    if engine != "vllm":
        from ..policies.hf import HFPolicy

        with loading(model):
            return HFPolicy.from_pretrained(model, **_placement(device, dtype))
    if device != "auto":
        raise BadInput(f"--device {device}: vLLM runs where it was built for; leave it out with --engine vllm")
    from ..integrations.vllm.load import load_policy as load

    return load(model, **{**_placement("cpu", dtype), **(options or {})})


def load_pair(
    pair: str | None,
    prm: str | None,
    reference: str | None,
    *,
    beta: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    name: str = "prm",
) -> ImplicitPRM:
    """A pair by its card, or by its two models. Raises BadInput, or see ImplicitPRM.from_pretrained.

    Args:
        pair: a folder or hub id with a card, or "demo".
        prm, reference: in its place: see ImplicitPRM.from_pretrained.
        beta: None for the card's.
        device, dtype: of both models.
        name: of the pair.
    """
    model = prm if pair is None else str(shipped()) if pair == DEMO else pair
    if model is None:
        raise BadInput("a pair is needed: --pair, or --prm and --reference")
    from ..scorers.implicit.implicit_prm import ImplicitPRM

    with loading(model):
        return ImplicitPRM.from_pretrained(model, reference, beta=beta, name=name, **_placement(device, dtype))


def load_scorer(
    scorer: str,
    format: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    name: str = "prm",
    option: str = "--scorer",
) -> ScorerBase:
    """A reward model of any kind by name. A step PRM keeps the last score of a path beyond its length, and says so.

    Args:
        scorer: hub id or folder of a step PRM, an outcome model or a pair with a card; or "demo".
        format: what it is, of scorers.kinds.KINDS; None to find out.
        device, dtype: of its models.
        name: key of its rewards.
        option: that names it, for messages.

    Raises:
        BadInput: the format is unknown or ambiguous, or the checkpoint does not fit it.
        ImportError, OSError: see scorers.load.load_scorer.
    """
    from ..scorers.load import load_scorer as load

    model = str(shipped()) if scorer == DEMO else scorer
    place = _placement(device, dtype)
    try:
        with loading(model):
            return load(model, format or AUTO, name=name, too_long="keep", **place)
    except ValueError as error:
        raise BadInput(f"{option} {scorer}: {str(error).replace('pass format=', 'pass --prm-format')}") from error


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Say on a terminal that a model is being loaded; of a GGUF file, which takes minutes, say it anywhere."""
    if name.endswith(".gguf"):
        print(f"prm-search: {name}: {GGUF_NOTE}", file=sys.stderr)
    with waiting(console(stderr=True), f"loading {name}"):
        yield


def _placement(device: str, dtype: str) -> dict[str, Any]:
    try:
        return placement(device, dtype)
    except ValueError as error:
        raise BadInput(f"--{error}") from error
