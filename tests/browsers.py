"""A headless Chromium for the tests of pages, through Playwright; they are left out where there is none."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name)) is not None), None)
LACKS = "chromium" if CHROMIUM is None else "playwright"
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason=f"the browser tests were left out: there is no {LACKS}",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=0)  # events decide, and no clock
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Watched:
    """A browser's page, with what it asked of the network and what went wrong in it.

    Attributes:
        page: Playwright's.
        requests: addresses.
        errors: uncaught errors, and errors on its console.
    """

    def __init__(self, browser: Any, *, width: int = 1280, height: int = 800, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(0)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, url: str) -> Any:
        """Go there, and wait until the page has drawn its first step."""
        self.page.goto(url)
        self.page.wait_for_selector("#app[data-ready]", state="attached")
        return self.page
