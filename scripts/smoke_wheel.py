"""Prove the built distributions from outside the checkout: ``python scripts/smoke_wheel.py DIST``, after `make test`.

1. The wheel, which was built from the sdist, equals one built from the checkout and has every file of the packages.
2. It is installed into an environment that has its core dependencies, linked from the running one, and nothing else: no
   extra, no checkout, no bare ``triton_kernels``. `smoke_inside.py` does its checks there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*command: object, cwd: Path) -> None:
    if subprocess.run([str(part) for part in command], cwd=cwd, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"smoke: failed: {' '.join(map(str, command))}")


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel but for RECORD, the list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith(("/", ".dist-info/RECORD"))}


NOT_IN_WHEELS = {"__pycache__", "custom_generate"}  # the second is a folder that transformers loads by its path


def checkout_files() -> dict[str, bytes]:
    """Every file of the package folders, by the path at which the wheel must have it."""
    contents = {}
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and NOT_IN_WHEELS.isdisjoint(file.parts):
                contents[f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"] = (
                    file.read_bytes()
                )
    return contents


def require_equal(what: str, left: dict[str, bytes], right: dict[str, bytes]) -> None:
    differing = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    if differing:
        sys.exit(f"smoke: {what} differ in {', '.join(differing)}")
    print(f"smoke: {what} agree in {len(left)} files", flush=True)


def build_from_checkout(scratch: Path) -> Path:
    """A wheel of a copy of the checkout; in the checkout itself setuptools would reuse whatever an older build left."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "node_modules")
    shutil.copytree(ROOT, scratch / "copy", ignore=ignored)
    run(
        sys.executable,
        "-m",
        "build",
        "--quiet",
        "--wheel",
        "--outdir",
        scratch / "direct",
        scratch / "copy",
        cwd=scratch,
    )
    (wheel,) = (scratch / "direct").glob("*.whl")
    return wheel


def core_dependencies() -> set[str]:
    """Distributions that the project needs when no extra is asked for, and all that those need in turn."""
    todo = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for line in distribution(requirement.name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in requirement.extras or {""}):
                todo.append(needed)
    return {name for name, _ in seen}


def make_environment(folder: Path) -> tuple[Path, Path]:
    """A virtual environment with links to the core dependencies: its interpreter and its site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in core_dependencies():
        dist = distribution(name)
        for top in {file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(dist.locate_file(top))).resolve())
    return folder / "bin" / "python", site


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} DIST, the folder with one wheel")
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    built = wheel_files(wheel)
    require_equal(
        "the wheel's packages and the checkout",
        {n: b for n, b in built.items() if ".dist-info/" not in n},
        checkout_files(),
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        require_equal(
            "the wheels built from the sdist and from the checkout", built, wheel_files(build_from_checkout(scratch))
        )
        python, site = make_environment(scratch / "venv")
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", wheel, cwd=scratch)
        shutil.copy(ROOT / "scripts" / "smoke_inside.py", scratch)
        run(python, "-I", "smoke_inside.py", site, cwd=scratch)


if __name__ == "__main__":
    main()
