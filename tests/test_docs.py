"""The documentation: its Python blocks run and print what they are said to print, and its links lead somewhere.

The models of the blocks compute in float64, so that the output shown is that of every machine. Run as a script, this
writes what the blocks print now into the pages.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # run as a script, there is no conftest.py

import pytest
from exact import exact_loading

ROOT = Path(__file__).resolve().parents[1]
RUN = ["README.md", "docs/search.md", "docs/scoring.md"]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass
class Block:
    """A Python block of a page, and the output that the page shows for it.

    Attributes:
        code, line: the block, and the line on which its code begins.
        said: what the `text` block directly below says that it prints; None where there is none.
        span: where that text stands in the page.
    """

    code: str
    line: int
    said: str | None = None
    span: tuple[int, int] = (0, 0)


def blocks(text: str) -> list[Block]:
    """The Python blocks to be run, in order: all whose info string is just `python`."""
    found: list[Block] = []
    last = None  # end of the block before, if it is one of ours
    for fence in _FENCE.finditer(text):
        info = fence["info"].strip()
        if info == "text" and last is not None and not text[last : fence.start()].strip():
            found[-1].said, found[-1].span = fence["body"], fence.span("body")
        last = fence.end() if info == "python" else None
        if info == "python":
            found.append(Block(fence["body"], text.count("\n", 0, fence.start("body")) + 1))
    return found


def outputs(page: str) -> Iterator[tuple[Block, str]]:
    """Run a page's blocks in one namespace, in float64; each with what it printed."""
    with exact_loading():
        yield from _outputs(page)


def _outputs(page: str) -> Iterator[tuple[Block, str]]:
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        # Blank lines before it: a traceback names the page's own lines.
        code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec", dont_inherit=True)
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(code, names)
        yield block, printed.getvalue()


@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers', from inside PEFT
def test_blocks_run(page: str) -> None:
    if page == "docs/scoring.md":
        pytest.importorskip("peft")
    seen = 0
    for block, printed in outputs(page):
        seen += 1
        if block.said is not None:
            where = f"{page}, line {block.line}: other output; python tests/test_docs.py writes it"
            assert _tidy(printed) == _tidy(block.said), where
    assert seen, "there is no Python block left to run"


def _tidy(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").split("\n")]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    broken = []
    for target in _LINK.findall(_prose(ROOT / page)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue  # another site's
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            broken.append(f"{target}: there is no such file")
        elif ROOT not in file.resolve().parents:
            broken.append(f"{target}: outside the repository")
        elif anchor and anchor not in _anchors(file):
            broken.append(f"{target}: no such heading")
    assert not broken, broken


def test_every_page_of_docs_is_in_the_sites_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page for page in PAGES if f": {page}\n" not in navigation]
    assert not pages, pages


def _prose(page: Path) -> str:
    """A page without code."""
    return re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", page.read_text(encoding="utf-8")))


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    made: set[str] = set()
    for heading in _HEADING.findall(text):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        number = next(n for n in range(len(made) + 1) if (f"{slug}-{n}" if n else slug) not in made)
        made.add(f"{slug}-{number}" if number else slug)
    return made


PAGE = """
```python
x
```

```text
1
```

```python notest
y
```
```text
2
```
"""


def test_the_convention() -> None:
    (block,) = blocks(PAGE)
    assert (block.code, block.line, block.said) == ("x\n", 3, "1\n")
    assert PAGE[slice(*block.span)] == "1\n"


def write() -> None:
    """Put what the blocks print now into the pages that show it."""
    for page in RUN:
        ran = list(outputs(page))
        text = (ROOT / page).read_text(encoding="utf-8")
        for block, printed in reversed(ran):
            if block.said is not None and _tidy(printed) != _tidy(block.said):
                begin, end = block.span
                text = text[:begin] + "\n".join(_tidy(printed)) + "\n" + text[end:]
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
