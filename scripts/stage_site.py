"""Stage the pages of the documentation site, `make docs`: writes build/site/pages, which mkdocs.yml builds.

The pages link one another and the code by paths of the repository. So the README, docs/ and all that they link to are
copied under the same paths, and the same links work on disk, in a forge and on the site. The API reference is written
here: a page for each group of public names, whose text mkdocstrings takes from the docstrings.

    python scripts/stage_site.py [--out build/site/pages]

Exit status 1: a page links to a file that does not exist.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import prm_search

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?P<before>\]\(\s*)(?P<target>[^)\s#]+)(?P<after>[^)]*\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Modules whose public names have no page in `prm_search.__all__` alone: what they hold is shown whole.
MODULES = {
    "kernels": ("Kernels", ["prm_search.triton_kernels"]),
    "training": ("Training", ["prm_search.training", "prm_search.training.objectives"]),
    "values": ("Values and answers", ["prm_search.values", "prm_search.answers"]),
    "vllm": ("vLLM", ["prm_search.integrations.vllm"]),
}
# A public name belongs to the first page whose prefix its module has.
PAGES = {
    "strategies": ("Strategies", ("prm_search.strategies",)),
    "scorers": ("Scorers", ("prm_search.scorers",)),
    "policies": ("Policies", ("prm_search.policies", "prm_search.policy")),
    "huggingface": ("In model.generate", ("prm_search.integrations", "prm_search.guidance")),
    "search": ("Search and its records", ("prm_search",)),
}

FIRST = ("search", "asearch")  # of their page


def local(target: str) -> bool:
    """Return True for a link to a file of the repository."""
    return not re.match(r"[a-z][a-z0-9+.-]*:", target)


def prose(text: str) -> str:
    """Return a page without its code blocks, where brackets are no links."""
    return _FENCE.sub("", text)


def linked(page: Path) -> Iterator[Path]:
    """Yield the files that a page links to. Raises FileNotFoundError for one that does not exist."""
    for link in _LINK.finditer(prose(page.read_text(encoding="utf-8"))):
        if local(link["target"]):
            path = (page.parent / link["target"]).resolve()
            if not path.exists():
                raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {link['target']}, which does not exist")
            yield entry(path)


def entry(path: Path) -> Path:
    """Return the file that stands for a path: a folder's README, or the first file of a package."""
    if not path.is_dir():
        return path
    return next((path / name for name in ("README.md", "__init__.py") if (path / name).exists()), path)


def reachable() -> set[Path]:
    """Return the pages, and what they link to, directly or over other pages."""
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen and path.is_file():
            seen.add(path)
            if path.suffix == ".md":
                waiting.extend(linked(path))
    return seen


def staged(page: Path) -> str:
    """Return a page as the site has it.

    Links to folders lead to the file that stands for them. A code block has only its language behind the fence, where
    the pages may say `notest` too.
    """

    def to_file(link: re.Match[str]) -> str:
        target = link["target"]
        path = (page.parent / target).resolve()
        if local(target) and path.is_dir() and entry(path) != path:
            target = f"{target.rstrip('/')}/{entry(path).name}"
        return f"{link['before']}{target}{link['after']}"

    text = re.sub(r"^(```\w+) [^\n`]*$", r"\1", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return _LINK.sub(to_file, text)


def reference() -> Iterator[tuple[str, str]]:
    """Yield the pages of the API reference: path and text."""
    public: dict[str, list[str]] = {name: [] for name in PAGES}
    for name in sorted(prm_search.__all__, key=lambda each: (each not in FIRST, each)):
        member = getattr(prm_search, name)
        if name.startswith("_") or type(member) is type(prm_search):
            continue
        module = getattr(member, "__module__", prm_search.__name__)
        page = next(key for key, (_, prefixes) in PAGES.items() if module.startswith(prefixes))
        public[page].append(f"{module}.{name}")
    for page, paths in public.items():
        yield f"reference/{page}.md", _page(PAGES[page][0], paths)
    for page, (title, modules) in MODULES.items():
        yield f"reference/{page}.md", _page(title, [path for module in modules for path in _members(module)])


def _members(module: str) -> list[str]:
    """Return where the public names of a module are defined; the module itself where it names none."""
    holder = import_module(module)
    members = {name: getattr(holder, name) for name in sorted(getattr(holder, "__all__", ()))}
    if not members:
        return [module]
    return [
        f"{getattr(member, '__module__', '')}.{name}"
        for name, member in members.items()
        if str(getattr(member, "__module__", "")).startswith(prm_search.__name__)  # not aliases of types, nor modules
    ]


def _page(title: str, paths: list[str]) -> str:
    return f"# {title}\n\n" + "\n".join(f"::: {path}\n" for path in dict.fromkeys(paths))


def main() -> int:
    """Write the pages. Returns the exit status."""
    command = argparse.ArgumentParser(description="Stage the documentation site's pages.")
    command.add_argument("--out", type=Path, default=ROOT / "build" / "site" / "pages", help="default: %(default)s")
    out = command.parse_args().out
    try:
        paths = reachable()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    for path in sorted(paths):
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text(staged(path), encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    for name, text in reference():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
