"""Models by name: what `--policy`, `--pair`, `--prm` and `--reference` mean. Importing this imports torch."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from ..demo import pair_dir
from ..policies.hf import HFPolicy
from ..scorers.implicit.implicit_prm import ImplicitPRM
from . import BadInput
from .records import reason

DEMO = "demo"  # the pair that ships; a folder of that name is ./demo
DTYPES = ("auto", "float32", "bfloat16", "float16")


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


def load_policy(name: str, *, device: str = "auto", dtype: str = "auto") -> HFPolicy:
    """The policy of that name, or the demo's. Raises BadInput, or see HFPolicy.from_pretrained."""
    return HFPolicy.from_pretrained(pair_dir() / "policy" if name == DEMO else name, **_options(device, dtype))


def load_vllm_policy(
    name: str, *, device: str = "auto", dtype: str = "auto", options: Mapping[str, Any] | None = None
) -> Any:
    """The same under vLLM: a VLLMPolicy.

    Args:
        options: further arguments of vllm.LLM.

    Raises:
        BadInput: a device is named, which is not vLLM's way, or dtype is unknown.
        ImportError, ValueError: see integrations.vllm.loading.load_policy.
    """
    if device != "auto":
        raise BadInput(f"--device {device}: vLLM runs where it was built for; leave it out with --engine vllm")
    from ..integrations.vllm.load import load_policy as load

    known = _options("cpu", dtype)
    return load(str(pair_dir() / "policy") if name == DEMO else name, **{**known, **(options or {})})


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
    model = prm if pair is None else str(pair_dir()) if pair == DEMO else pair
    if model is None:
        raise BadInput("a pair is needed: --pair, or --prm and --reference")
    return ImplicitPRM.from_pretrained(model, reference, beta=beta, name=name, **_options(device, dtype))


def _options(device: str, dtype: str) -> dict[str, Any]:
    """For from_pretrained. A GPU is used where there is one; that needs the package accelerate."""
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype!r} is unknown; it is one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {reason(error)}") from error
    return {"dtype": dtype} | ({} if place.type == "cpu" else {"device_map": {"": place}})
