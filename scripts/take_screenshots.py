"""Pictures of the pages, for the docs: ``python scripts/take_screenshots.py [FOLDER]``, with Chromium and Playwright.

The searches are the demo pair's, with fixed seeds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

from prm_search.cli import main as prm_search

PROMPT = "=2a+7b*3c*4d-8e+1f*9g+3?"
DEMO = ("--policy", "demo", "--pair", "demo")
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
Act = Callable[[Any], object]


def command(*arguments: str) -> None:
    if status := prm_search(list(arguments)):
        sys.exit(f"prm-search {' '.join(arguments)} ended with status {status}")


def pages(folder: Path) -> dict[str, Path]:
    """Make the pages: two strategies on one prompt, and scored responses."""
    draws = ("--prompt", PROMPT, "--temperature", "1.3", "--tree", "--json")
    beam = ("--strategy", "beam", "--width", "4", "--expansions", "6", "--value", "min")
    command("generate", *DEMO, *draws, *beam, "--out", str(folder / "beam.jsonl"))
    command(
        "generate", *DEMO, *draws, "--strategy", "best_of_n", "--n", "12", "--out", str(folder / "best of 12.jsonl")
    )
    both, alone, score = folder / "both.html", folder / "alone.html", folder / "score.html"
    trees = [str(folder / name) for name in ("beam.jsonl", "best of 12.jsonl")]
    command("view", *trees, "-o", str(both), "--title", "A beam and best-of-12")
    command("view", trees[0], "-o", str(alone), "--title", "A beam of 4 x 6")
    responses = ("a*7=5;b+3=8;c*9=2;d+8=0", "a*7=5;b+3=9;c*9=1;d+8=9")
    rows = [json.dumps({"prompt": "=5a*7b+3c*9d+8?", "response": response}) for response in responses]
    (folder / "responses.jsonl").write_text("\n".join(rows))
    command("score", "--pair", "demo", "--data", str(folder / "responses.jsonl"), "--json", "--html", str(score))
    return {"both": both, "alone": alone, "score": score}


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def picture(browser: Any, url: str, file: Path, act: Act, *, width: int, height: int, dark: bool = False) -> None:
    """Take a picture of a page after `act` has used it."""
    scheme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(0)  # a loaded machine takes its time
    page.goto(url)
    act(page)
    page.wait_for_timeout(300)  # for what fades in; nothing is compared
    page.screenshot(path=file)
    page.close()
    print(f"{file}: {file.stat().st_size / 1024:.0f} kB")


@contextmanager
def server() -> Iterator[str]:
    """A server over the demo pair, at a free port: the address of its /ui."""
    import asyncio
    import threading

    import uvicorn

    from prm_search import HFPolicy, ImplicitPRM, StepRule
    from prm_search.demo import pair_dir
    from prm_search.serving.app import make_app
    from prm_search.serving.backend import ThreadEngine
    from prm_search.serving.run import listen

    policy = HFPolicy.from_pretrained(pair_dir() / "policy")
    pair = ImplicitPRM.from_pretrained(pair_dir())
    app = make_app(lambda: ThreadEngine.of_hf(policy, pair), ["demo"], steps=StepRule(";"))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=asyncio.run, args=[running.serve(sockets=[sock])])
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/ui"
    finally:
        running.should_exit = True
        thread.join()


def search(page: Any) -> None:
    """Search on the page of a server, and wait for the end."""
    page.wait_for_selector("option >> text=demo", state="attached")
    page.get_by_role("textbox", name="Prompt").fill(PROMPT)
    page.get_by_text("Steps, sampling, choice").click()
    for label, value in (("Temperature", "1.3"), ("Seed", "3")):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Rank by").select_option("min")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("text=Finished:")
    page.locator(".side").evaluate("(side) => side.scrollTo(0, 0)")


def step(page: Any, text: str) -> Any:
    return page.locator(".card", has_text=text).first


def take(folder: Path) -> None:
    """Take every picture of the docs."""
    wide, phone = {"width": 1280, "height": 720}, {"width": 390, "height": 780}

    def unfolded(page: Any) -> None:
        page.get_by_role("button", name="Unfold all").click()
        step(page, "c*3=1").click()

    with tempfile.TemporaryDirectory() as scratch:
        made = {name: file.as_uri() for name, file in pages(Path(scratch)).items()}
        with server() as address, chromium() as browser:  # models are loaded before Playwright's loop runs
            picture(browser, address, folder / "ui.png", search, **wide)
            picture(browser, address, folder / "ui-phone.png", search, **phone, dark=True)
            picture(browser, made["both"], folder / "view.png", lambda page: step(page, "b*3=0").hover(), **wide)
            picture(browser, made["alone"], folder / "view-dark.png", unfolded, **wide, dark=True)
            picture(
                browser, made["alone"], folder / "view-phone.png", lambda page: step(page, "c*3=1").click(), **phone
            )
            picture(browser, made["score"], folder / "score.png", lambda page: None, width=900, height=620)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images")
    target.mkdir(parents=True, exist_ok=True)
    take(target)
