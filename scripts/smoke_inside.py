"""The checks of `smoke_wheel.py` where the wheel and its core dependencies are: ``python -I smoke_inside.py SITE``."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

# Modules that exist to drive an optional package may import it at their top; nothing else may.
SERVING = ("prm_search.serving.", "prm_search.integrations.vllm.endpoint")
OPTIONAL = {
    "triton": "prm_search.triton_kernels.",
    "vllm": "prm_search.integrations.vllm.",
    "matplotlib": ("prm_search.evaluation.plots", "prm_search.evaluation.tuning.plots"),
    "lm_eval": "prm_search.integrations.lm_eval",
    **dict.fromkeys(("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"), SERVING),
}


def require(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"smoke: {message}")


def modules(package: str) -> Iterator[str]:
    """A package and all modules below it, found without importing those."""
    yield package
    spec = find_spec(package)
    require(spec is not None and spec.submodule_search_locations is not None, f"{package} is not a package")
    for info in pkgutil.iter_modules(spec.submodule_search_locations, f"{package}."):
        if info.ispkg:
            yield from modules(info.name)
        elif not info.name.endswith(".__main__"):
            yield info.name


def import_all() -> tuple[int, list[str]]:
    """Import every module; those that want an absent optional package, where that is allowed, are returned by name."""
    done, waiting = 0, []
    for name in modules("prm_search"):
        try:
            importlib.import_module(name)
            done += 1
        except ModuleNotFoundError as error:
            require(error.name in OPTIONAL and name.startswith(OPTIONAL[error.name]), f"{name} needs {error.name}")
            waiting.append(name)
    return done, waiting


def seconds(code: str) -> float:
    """Return what a fresh interpreter measures for ``code``, which prints it."""
    return float(subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    site = Path(sys.argv[1])
    import prm_search

    require(
        Path(prm_search.__file__) == site / "prm_search" / "__init__.py", f"prm_search comes from {prm_search.__file__}"
    )
    require(prm_search.__version__ == distribution("prm-search").version, "__version__ is not the distribution's")
    for bare in ("triton_kernels", "integrations", "benchmarks", "tests"):
        require(find_spec(bare) is None, f"the wheel, or what it needs, installs a top-level {bare}")
    owned = sorted(name for name, owners in packages_distributions().items() if "prm-search" in owners)
    require(owned == ["prm_search"], f"the wheel installs the top-level names {owned}")
    require((site / "prm_search" / "py.typed").is_file(), "py.typed is missing")
    for name in prm_search.__all__:
        getattr(prm_search, name)
    done, waiting = import_all()
    print(f"smoke: {len(prm_search.__all__)} public names and {done} modules import")
    print(f"smoke: waiting for their optional package: {', '.join(waiting) or 'none'}")

    from prm_search.demo import pair_dir

    data = [file for file in pair_dir().rglob("*") if file.is_file()]
    require(pair_dir().is_relative_to(str(files("prm_search"))), f"the demo pair is at {pair_dir()}")
    require(any(file.suffix == ".safetensors" for file in data), f"the demo pair has no weights: {data}")
    print(f"smoke: the demo pair has {len(data)} files, {sum(file.stat().st_size for file in data) / 2**20:.1f} MiB")

    from prm_search.viewer.page import view_page
    from prm_search.viewer.page_tree import PageStep, PageTree

    page = view_page("smoke", [PageTree("tree", [("", "prompt")], [PageStep(0, "step")])])
    require("</script>" in page and "</style>" in page, "the page of view lacks its script or style")
    print(f"smoke: a page of view has {len(page) / 2**10:.0f} KiB")

    command = Path(sys.executable).parent / "prm-search"
    shown = subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout
    require("demo" in shown, f"prm-search --help shows no demo: {shown}")

    clock = "import time; {before}; t = time.perf_counter(); import prm_search; print(time.perf_counter() - t)"
    alone, after = seconds(clock.format(before="pass")), seconds(clock.format(before="import torch"))
    print(f"smoke: import prm_search takes {alone:.2f} s alone, {after:.2f} s after torch; prm-search --help answers")


if __name__ == "__main__":
    main()
