"""Pages as HTML: one file each, that loads nothing and may load nothing."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from .page_tree import FOLDED, PageTree

STATIC = Path(__file__).with_name("static")
VERSION = 1  # of the data that viewer.js reads


def view_page(title: str, trees: Sequence[PageTree], notes: Sequence[str] = ()) -> str:
    """A page of trees.

    Args:
        title: plain text.
        trees: at least one.
        notes: sentences for the reader, above the trees.

    Returns:
        HTML. Everything in it that a user or a model wrote is data, and none of it is markup.
    """
    data: dict[str, Any] = {"version": VERSION, "title": title, "notes": list(notes), "folded": FOLDED}
    data["trees"] = [tree.record() for tree in trees]
    return _page(title, "view", data, policy_of("'none'"))


def live_page(settings: Mapping[str, Any]) -> str:
    """The page of a server, on which searches are begun and watched.

    Args:
        settings: what frontend/src/live.ts reads: strategies with their fields, names of values and votes.
    """
    return _page("prm-search", "live", {"version": VERSION, **settings}, None)


def policy_of(connect: str) -> str:
    """The Content-Security-Policy of a page: its own script and style, and `connect` to talk to; nothing else."""
    return (
        f"default-src 'none'; script-src {_hash(_asset('viewer.js'))}; style-src {_hash(_asset('viewer.css'))}; "
        f"connect-src {connect}; img-src data:; base-uri 'none'; form-action 'none'"
    )


@cache
def _asset(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


@cache
def _hash(source: str) -> str:
    return f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'"


def _page(title: str, kind: str, data: Mapping[str, Any], policy: str | None) -> str:
    """A page. `policy` stands in it, unless a header says it."""
    meta = "" if policy is None else f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{meta}<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(_plain(title))}</title>
<style>{_asset("viewer.css")}</style>
</head>
<body>
<div id="app" data-kind="{kind}"><noscript>This page needs JavaScript. It loads nothing from elsewhere.</noscript></div>
<script type="application/json" id="data">{embedded(data)}</script>
<script>{_asset("viewer.js")}</script>
</body>
</html>
"""


def embedded(data: Any) -> str:
    """JSON that can stand in a script element, whatever texts are in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(text: str) -> str:
    """Text without control characters, which have no business in a title."""
    return "".join(character if character.isprintable() else " " for character in text)
