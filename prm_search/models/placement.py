"""The device and dtype of a model, as transformers takes them; and the place of the shipped pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEMO = "demo"  # the name of the pair that ships; a folder of that name is ./demo
DTYPES = ("auto", "float32", "bfloat16", "float16")


def shipped() -> Path:
    """The folder of the shipped pair: `policy` (also the reference), `prm` and the card `pair.json`.

    Raises:
        FileNotFoundError: the package was installed without its data, or from a zip file that was never unpacked.
    """
    folder = Path(__file__).resolve().parents[1] / "demo" / "pair"
    if not (folder / "pair.json").is_file():
        raise FileNotFoundError(f"the demo pair is not at {folder}: install prm-search from a wheel or a full checkout")
    return folder


def placement(device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Arguments of from_pretrained. A GPU is used where there is one; that needs the package accelerate.

    Args:
        device: "auto", or what torch.device takes.
        dtype: one of `DTYPES`.

    Raises:
        ValueError: dtype is unknown, or the device is not there; the argument is named.
    """
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; it is one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    return {"dtype": dtype} | ({} if place.type == "cpu" else {"device_map": {"": place}})
