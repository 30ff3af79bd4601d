"""The built assets of the pages: made of the sources that lie beside them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prm_search.viewer.page import STATIC

FRONTEND = Path(__file__).resolve().parents[1] / "frontend"
MADE_OF = ("package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")
AGAIN = "run `make frontend` and commit prm_search/viewer/static"


def digest() -> str:
    """The digest of everything that the assets are made of, as frontend/vite.config.ts computes it."""
    names = sorted([*MADE_OF, *(f"src/{path.name}" for path in (FRONTEND / "src").iterdir())])
    whole = hashlib.sha256()
    for name in names:
        whole.update(name.encode() + b"\0" + (FRONTEND / name).read_bytes() + b"\0")
    return whole.hexdigest()


def test_the_assets_are_of_these_sources():
    assert (STATIC / "sources.sha256").read_text().strip() == digest(), f"frontend/ has changed: {AGAIN}"


@pytest.mark.skipif(
    shutil.which("npm") is None or not (FRONTEND / "node_modules").is_dir(),
    reason="no npm, or frontend/node_modules is not installed (npm install --no-save)",
)
def test_a_build_gives_the_assets(tmp_path):
    subprocess.run(
        ["npm", "run", "--silent", "build"], cwd=FRONTEND, env=os.environ | {"OUT": str(tmp_path)}, check=True
    )
    built = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert built.keys() == {path.name for path in STATIC.iterdir()}
    differing = [name for name, content in built.items() if (STATIC / name).read_bytes() != content]
    assert not differing, f"{differing} differ: {AGAIN}"


def test_the_lock_file_names_versions_and_no_registry():
    lock = json.loads((FRONTEND / "package-lock.json").read_text())
    assert lock["packages"]["node_modules/d3-hierarchy"]["integrity"].startswith("sha512-")
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]


def test_the_script_can_stand_in_a_page_and_names_its_license():
    source = (STATIC / "viewer.js").read_text()
    assert "</script" not in source
    assert "<!--" not in source
    assert "Mike Bostock" in source
