"""What every test runs under: no network, few threads, the same examples each time, GPU tests only where there is one.

PRM_SEARCH_SOAK=N makes it a soak: N times as many examples, drawn anew each time, and the tests marked soak.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny and the cores are shared
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

HERE = Path(__file__).parent
HELPERS = (HERE, HERE.parent / "examples" / "grade_school")  # modules by name, for tests

# What a bare GPU machine lacks, which has torch, triton, transformers and pytest: files that need one of these are not
# collected there, so that `pytest -m gpu` runs the rest. The header names them; where all is installed nothing changes.
OPTIONAL = ("hypothesis", "peft", "typer", "rich", "fastapi", "uvicorn", "openai")
MISSING = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def _needs(file: Path) -> set[str]:
    """Modules that a test file imports at its top, directly or by the helpers beside it; a command needs typer."""
    found = set(re.findall(r"^(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE))
    names = {"typer" if name.startswith(("prm_search.cli", "prm_search.commands")) else name for name in found}
    names = {name.partition(".")[0] for name in names}
    return names.union(*(_needs(HERE / f"{name}.py") for name in names if (HERE / f"{name}.py").is_file()))


def _left_out() -> list[str]:
    return [file.name for file in sorted(HERE.glob("test_*.py")) if _needs(file) & set(MISSING)] if MISSING else []


collect_ignore = _left_out()


def pytest_addoption(parser: pytest.Parser) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:  # whose option pyproject.toml sets
        parser.addini("timeout", "seconds a test may take; without pytest-timeout: as many as it likes")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout(seconds): as the option; without pytest-timeout: no limit")


def pytest_report_header() -> str | None:
    return f"not collected without {', '.join(MISSING)}: {', '.join(collect_ignore)}" if collect_ignore else None


class _Helpers:
    """Makes the helper modules beside the tests (fakes.py ...) and the example's scripts importable by name.

    Nothing is put on sys.path.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if "." in name or name.startswith(("test_", "conftest")):
            return None
        file = next((folder / f"{name}.py" for folder in HELPERS if (folder / f"{name}.py").is_file()), None)
        return None if file is None else importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(_Helpers)  # type: ignore[arg-type]

from soak import SOAK, examples  # noqa: E402

if "hypothesis" not in MISSING:
    from hypothesis import settings

    settings.register_profile("tests", deadline=None, derandomize=not SOAK, max_examples=examples(100))
    settings.load_profile("tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _same_in_every_process(items)
    _slow_files_first(items)
    if not SOAK:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def float64_models() -> Iterator[None]:
    """Every Llama checkpoint that this file loads computes in float64."""
    from exact import exact_loading

    with exact_loading():
        yield


@pytest.fixture(scope="module")
def demo_models(float64_models: None) -> tuple[Any, Any]:
    """The demo's policy and pair, in float64 and kept loaded: the commands of this file find them so."""
    from prm_search.commands.models import load_pair, load_policy

    return load_policy("demo"), load_pair("demo", None, None)


@pytest.fixture(scope="module")
def demo_pair(float64_models: None) -> Any:
    """The demo's pair, in float64."""
    from prm_search.demo import pair_dir
    from prm_search.scorers.implicit.implicit_prm import ImplicitPRM

    return ImplicitPRM.from_pretrained(pair_dir())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`prm-search` in this process: its status, and what it wrote on standard output and standard error."""
    from prm_search.cli import main

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        written = capsys.readouterr()
        return status, written.out, written.err

    return call


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _same_in_every_process(items: list[pytest.Item]) -> None:
    """Workers collect for themselves, and their lists are compared. A set shows in two runs; an address shows here."""
    for item in items:
        if re.search(r"\b0x[0-9a-f]{5,}", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: an object's address is no part of a test's name: give it an id")


def _slow_files_first(items: list[pytest.Item]) -> None:
    """Workers take whole files, in order: one that takes a minute must not be the last to begin."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
