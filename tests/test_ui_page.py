"""The server's page in a browser: a search is begun, its tree grows, it is stopped, and copied as code."""

from __future__ import annotations

import ast
import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from browsers import Watched, browser, needs_browser
from fakes import EOS, FakePolicy, FakeScorer, ToyLM, ids
from page_trees import HOSTILE
from servers import Served, serving, until

from prm_search.protocols import Request
from prm_search.serving.app import make_app
from prm_search.serving.backend import ThreadEngine
from prm_search.steps import StepRule
from prm_search.tree import Node, Prompt

__all__ = ["browser"]
pytestmark = needs_browser


class Letters:
    """A vocabulary of bytes."""

    special = frozenset([EOS])

    @staticmethod
    def piece(token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class Metered(FakePolicy):
    """A policy that draws only as often as it is let.

    Attributes:
        left: calls of `advance` that it draws in yet.
    """

    def __init__(self) -> None:
        super().__init__(ToyLM("ab;"), context=4000)
        self.left = 0

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return ids(prompt.text) if prompt.text is not None else super().encode(prompt)

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        if self.left <= 0:
            time.sleep(0.001)
            return []
        self.left -= 1
        return super().advance()


def serve(**options: Any) -> Any:
    policy = Metered()
    app = make_app(
        lambda: ThreadEngine(policy, FakeScorer(), Letters()), ["tiny"], steps=StepRule(";", max_tokens=6), **options
    )  # type: ignore[arg-type]
    return policy, serving(app)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Metered, Served]]:
    policy, running = serve()
    with running as served:
        yield policy, served


@pytest.fixture
def opened(browser: Any, server: tuple[Metered, Served]) -> Iterator[tuple[Watched, Metered, Served]]:
    policy, served = server
    watched = Watched(browser)
    watched.open(f"http://127.0.0.1:{served.port}/ui")
    watched.page.wait_for_selector("option >> text=tiny", state="attached")
    yield watched, policy, served
    policy.left = 1 << 30
    watched.context.close()
    until(lambda: not served.service.jobs)
    policy.left = 0
    assert watched.errors == []
    assert {url.split("/")[2] for url in watched.requests} == {f"127.0.0.1:{served.port}"}


def begin(page: Any, prompt: str = "p", **fields: str) -> None:
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_text("Steps, sampling, choice").click()
    for label, value in {"Tokens of the answer": "12", "Seed": "5", **fields}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Search").click()


def root_card(page: Any) -> Any:
    """The prompt's card: only what is near the seen part is in the document."""
    page.get_by_role("tree").focus()
    page.keyboard.press("Home")
    page.wait_for_selector(".card.root.selected")
    return page.locator(".card.root")


def test_a_tree_grows_while_it_is_searched(opened: tuple[Watched, Metered, Served]) -> None:
    watched, policy, _ = opened
    page = watched.page
    policy.left = 3
    begin(page, width="2", expansions="2")
    page.wait_for_selector(".state >> text=Searching")
    until(lambda: policy.left == 0)
    assert page.get_by_role("button", name="Search").is_disabled()
    policy.left = 1 << 30
    page.wait_for_selector(".state >> text=/Finished: [0-9]+ steps/")
    steps = int(re.findall(r"([0-9]+) steps?", page.locator(".state").inner_text())[0])
    assert page.locator(".card.chosen.selected").count() == 1
    assert page.locator("aside .token").count() > 0
    assert root_card(page).locator(".facts").inner_text() == f"{steps} step{'s' if steps > 1 else ''}"
    costs = page.locator(".live-costs").inner_text()
    for word in ("policy", "sampled", "encoded", "forwards", "seconds"):
        assert word in costs


def test_a_search_can_be_stopped(opened: tuple[Watched, Metered, Served]) -> None:
    watched, policy, served = opened
    page = watched.page
    policy.left = 0
    begin(page)
    until(lambda: len(served.service.jobs) == 1)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".state >> text=Stopped by you")
    until(lambda: not served.service.jobs)
    policy.left = 1 << 30
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector(".state >> text=Finished")


def test_what_the_server_refuses_is_said_at_its_field(opened: tuple[Watched, Metered, Served]) -> None:
    watched, policy, _ = opened
    policy.left = 1 << 30
    page = watched.page
    begin(page, width="-3")
    page.wait_for_selector("[role=alert] >> text=width=-3")
    assert page.get_by_label("width").get_attribute("aria-invalid") == "true"
    assert page.evaluate("document.activeElement.labels[0].textContent") == "width"
    assert any("400" in error for error in watched.errors)
    watched.errors.clear()
    page.get_by_label("width").fill("2")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector(".state >> text=Finished")
    assert page.locator("[role=alert]").is_hidden()


def test_a_strategy_brings_its_own_options(opened: tuple[Watched, Metered, Served]) -> None:
    watched, policy, _ = opened
    policy.left = 1 << 30
    page = watched.page
    page.get_by_label("Strategy", exact=True).select_option("best_of_n")
    assert page.get_by_label("expansions").count() == 0
    page.get_by_label("n", exact=True).fill("3")
    begin(page)
    page.wait_for_selector(".state >> text=Finished")


def test_hostile_prompts_stay_text(opened: tuple[Watched, Metered, Served]) -> None:
    watched, policy, _ = opened
    policy.left = 1 << 30
    begin(watched.page, HOSTILE)
    watched.page.wait_for_selector(".state >> text=Finished")
    assert watched.page.evaluate("window.hacked") is None
    assert root_card(watched.page).locator(".says").inner_text().strip() == HOSTILE


def test_the_search_is_copied_as_a_command_and_as_python(opened: tuple[Watched, Metered, Served]) -> None:
    watched, policy, served = opened
    policy.left = 1 << 30
    page = watched.page
    prompt = 'it\'s "p" \\ $x `y`\n\u00e9'
    begin(page, prompt, width="2", expansions="2")
    page.wait_for_selector(".state >> text=Finished")
    text = page.evaluate("document.querySelector('aside').innerText")
    page.get_by_role("button", name="Copy as curl").click()
    words = shlex.split(page.locator(".code").inner_text().replace("\\\n", " "))
    assert words[:3] == ["curl", "-s", f"http://127.0.0.1:{served.port}/v1/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == {
        "prompt": prompt, "max_tokens": 12, "temperature": 1, "seed": 5, "model": "tiny",
        "prm_guidance": {"strategy": "beam", "width": 2, "expansions": 2},
    }  # fmt: skip
    answer = json.loads(served.send("/v1/completions", body, {"Content-Type": "application/json"})[2])
    assert answer["choices"][0]["text"].split(";")[0] in text  # the search that was shown

    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Copy as Python").click()
    tree = ast.parse(page.locator(".code").inner_text())
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "create"
    ]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given.pop("extra_body") == {"prm_guidance": body.pop("prm_guidance")}
    assert given == body


def test_a_server_with_keys_shows_the_page_and_asks_for_one(browser: Any) -> None:
    policy, running = serve(api_keys=["secret"])
    policy.left = 1 << 30
    with running as served:
        watched = Watched(browser)
        page = watched.open(f"http://127.0.0.1:{served.port}/ui")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        page.wait_for_selector("option >> text=tiny", state="attached")
        begin(page)
        page.wait_for_selector(".state >> text=Finished")
        page.get_by_role("button", name="Copy as curl").click()
        code = page.locator(".code").inner_text()
        assert "$PRM_SEARCH_API_KEY" in code
        assert "secret" not in code
        watched.context.close()


def test_at_phone_width_the_page_scrolls_down_and_not_sideways(browser: Any, server: tuple[Metered, Served]) -> None:
    watched = Watched(browser, width=390, height=800)
    page = watched.open(f"http://127.0.0.1:{server[1].port}/ui")
    page.wait_for_selector("option >> text=tiny", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.documentElement.scrollHeight") > 800
    watched.context.close()
