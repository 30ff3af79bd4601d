"""The page of trees in a browser: it loads nothing, folds, filters, compares, and shows hostile text as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import Watched, browser, needs_browser
from page_trees import HOSTILE, RIGHT_TO_LEFT, add, beam_tree, hostile_tree

from prm_search.commands.view import write_page
from prm_search.viewer.page_tree import PageStep, PageTree

__all__ = ["browser"]
pytestmark = needs_browser
Open = Callable[..., Watched]
MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Any:
    """Open the page of some trees, offline; what it asked for and what failed is checked at the end."""
    opened: list[Watched] = []

    def show(*trees: PageTree, **options: Any) -> Watched:
        file = tmp_path / "page.html"
        write_page("--out", str(file), "The page", trees)
        watched = Watched(browser, **options)
        watched.context.set_offline(True)
        opened.append(watched)
        watched.open(file.as_uri())
        watched.page.wait_for_selector(".card")
        return watched

    yield show
    for watched in opened:
        assert watched.errors == []
        assert watched.requests == [(tmp_path / "page.html").as_uri()]
        watched.context.close()


def beam(prompt: str = "What is 2 + 3 * 4?", name: str = "beam") -> PageTree:
    tree, end = beam_tree(prompt)
    return PageTree.of(tree, name, chosen=end, facts=[("answer", "14")], usage={"sampled_tokens": {"policy": 10}})


def texts(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".card .says").all_inner_texts()]


def test_it_shows_the_tree_with_pruned_branches_folded(shown: Open) -> None:
    page = shown(beam()).page
    assert texts(page) == ["What is 2 + 3 * 4?", "First, 3 * 4 = 12.", "Then 2 + 12 = 14.", "Then 2 + 12 = 15."]
    assert page.locator(".card.chosen").count() == 3
    assert page.locator(".fold").inner_text().split() == ["⋯", "2", "pruned", "best", MINUS + "0.750"]
    widths = [path.get_attribute("stroke-width") for path in page.locator(".links path.on").all()]
    assert sorted(widths) == ["2", "5"]  # drawn once, and three times
    aside = page.locator("aside").inner_text()
    for words in ("What is 2 + 3 * 4?", "First, 3 * 4 = 12.Then 2 + 12 = 14.", "answer", "sampled"):
        assert words in aside


def test_a_fold_opens_and_a_step_closes(shown: Open) -> None:
    page = shown(beam()).page
    page.locator(".fold").click()
    page.wait_for_selector(".card >> text=First, 2 + 3 = 5.")
    assert page.locator(".card.pruned").count() == 3
    page.locator(".card", has_text="First, 3 * 4").locator(".toggle").click()
    page.wait_for_selector(".card >> text=Then 2 + 12 = 14.", state="detached")
    assert page.locator(".card", has_text="First, 3 * 4").locator(".toggle").inner_text() == "+2"
    page.get_by_role("button", name="Unfold all").click()
    page.wait_for_selector(".card >> text=Then 5 * 4 = 20.")
    page.get_by_role("button", name="Fold pruned").click()
    page.wait_for_selector(".fold")


def test_keys_move_fold_and_find_the_chosen_end(shown: Open) -> None:
    page = shown(beam()).page
    tree = page.get_by_role("tree", name="Tree 1")
    tree.focus()
    page.keyboard.press("ArrowRight")
    current = page.locator(".card.selected")
    current.wait_for()
    assert current.get_attribute("id") == tree.get_attribute("aria-activedescendant")
    name = current.get_attribute("aria-label")
    assert name == "First, 3 * 4 = 12., reward +0.750, q +0.750, drawn 3 times, on the chosen path"
    assert (current.get_attribute("aria-level"), current.get_attribute("aria-expanded")) == ("2", "true")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card.selected[aria-expanded=false]")
    page.keyboard.press("c")
    page.wait_for_selector(".card.selected >> text=Then 2 + 12 = 14.")
    page.keyboard.press("End")
    page.wait_for_selector(".fold.selected")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card >> text=Nothing to do.")


def test_a_filter_leaves_the_matches_and_what_is_above_them(shown: Open) -> None:
    page = shown(beam()).page
    page.locator("body").press("/")
    page.keyboard.type("THEN 5")
    page.wait_for_selector(".card mark")
    assert texts(page) == ["What is 2 + 3 * 4?", "First, 2 + 3 = 5.", "Then 5 * 4 = 20."]
    assert page.locator(".status").inner_text() == "1 of 6 steps"
    page.keyboard.press("Enter")
    page.wait_for_selector("aside >> text=Step 2")
    page.keyboard.press("Escape")
    page.wait_for_selector(".card >> text=Then 2 + 12 = 14.")


def test_tokens_show_their_rewards(shown: Open) -> None:
    page = shown(beam()).page
    step = page.locator(".card", has_text="First, 3 * 4")
    step.hover()
    page.wait_for_selector(".popover .token")
    assert page.locator(".popover .token").all_inner_texts() == ["First, 3 ", "* 4 = 12."]
    assert "reward +0.750 · q +0.750" in page.locator(".popover p").inner_text()
    step.click()
    page.locator("aside .token").nth(1).hover()
    page.wait_for_selector("aside .told >> text=reward +0.500 q +0.750")


def test_trees_of_one_prompt_stand_side_by_side(shown: Open) -> None:
    page = shown(beam(), beam(name="best of n")).page
    page.wait_for_selector(".pane >> nth=1")
    left, right = (page.locator(".pane").nth(place).bounding_box() for place in (0, 1))
    assert (left["y"], left["height"]) == (right["y"], right["height"])
    assert left["x"] + left["width"] <= right["x"]
    compare = page.get_by_role("button", name="Compare")
    assert compare.get_attribute("aria-pressed") == "true"
    compare.click()
    page.wait_for_selector(".pane >> nth=1", state="detached")


def test_two_scorers_of_one_tree_stand_side_by_side(shown: Open) -> None:
    tree, end = beam_tree()
    for node in tree.nodes[1:]:
        node.set_rewards("other", -node.rewards["prm"])
    page = shown(PageTree.of(tree, "both", chosen=end)).page
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".pane >> nth=1")
    rewards = [
        page.locator(".pane").nth(pane).locator(".card", has_text="First, 3").locator("b").inner_text()
        for pane in (0, 1)
    ]
    assert rewards == ["+0.750", MINUS + "0.750"]
    assert "q (other)" not in page.locator("aside").inner_text()
    page.locator(".pane").nth(0).locator(".card", has_text="First, 3").click()
    page.wait_for_selector("aside >> text=reward (other)")


def test_hostile_text_stays_text(shown: Open) -> None:
    tree, end = hostile_tree()
    page = shown(PageTree.of(tree, HOSTILE, chosen=end)).page
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert texts(page)[1] == HOSTILE
    assert texts(page)[2] == RIGHT_TO_LEFT.replace("\u202e", "\\u202e").replace("\u202c", "\\u202c")
    last = page.locator(".card", has_text="word word")
    assert len(last.locator(".says").inner_text()) <= 150
    last.click()
    page.wait_for_selector("aside .token >> nth=399")
    assert len(page.locator("aside .tokens").inner_text()) == 100_000


def test_a_page_cannot_ask_the_network(browser: Any, tmp_path: Path) -> None:
    write_page("--out", str(tmp_path / "p.html"), "t", [beam()])
    watched = Watched(browser)
    watched.open((tmp_path / "p.html").as_uri())
    script = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert watched.page.evaluate(script) == "refused"
    assert any("Content Security Policy" in error for error in watched.errors)
    watched.context.close()


def test_rewards_that_are_no_numbers_are_hatched(shown: Open) -> None:
    tree, end = beam_tree()
    add(tree.root, "strange", [float("nan")], finish="stop")
    page = shown(PageTree.of(tree, "t", chosen=end)).page
    assert page.locator(".card.strange b").inner_text() == "NaN"
    assert "NaN or infinite" in page.locator(".banner").inner_text()


def test_a_hundred_thousand_steps_open_folded_and_stay_few_in_the_document(shown: Open) -> None:
    steps = [PageStep(place // 10, f"step {place}", 1, value=float(place)) for place in range(100_000)]
    for place in range(90_000, 100_000):
        steps[place].finish = "stop"
    page = shown(PageTree("large", [("", "p")], steps)).page
    assert "100,000 steps: opens folded" in page.locator(".banner").inner_text()
    assert page.locator(".card").count() < 60
    page.locator("[role=tree]").focus()
    page.keyboard.press("c")
    page.wait_for_selector(".card.selected >> text=step 99999")
    page.get_by_role("button", name="Unfold all").click()
    page.wait_for_function("document.querySelector('.sizer').offsetHeight > 1000000")
    assert page.locator(".card").count() < 200
    page.get_by_label("Filter steps by their text").fill("step 77")
    page.wait_for_selector(".status >> text=1,111 of 100,000 steps")


def test_at_phone_width_it_is_an_outline_that_fits(shown: Open) -> None:
    page = shown(beam(), width=390, height=800).page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    cards = [card.bounding_box() for card in page.locator(".card").all()]
    assert all(card["x"] >= 0 and card["x"] + card["width"] <= 390 for card in cards)
    assert [card["y"] for card in cards] == sorted(card["y"] for card in cards)
    buttons = [button.bounding_box() for button in page.locator("button:visible").all()]
    assert all(box["x"] + box["width"] <= 390 for box in buttons)


CONTRAST = """
(element) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const grounds = [];
  for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
  const ground = light(grounds), ink = light([...grounds, getComputedStyle(element).color]);
  return (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_both_schemes(shown: Open, scheme: str) -> None:
    """WCAG 2.2's contrast of normal text is 4.5; cards of the strongest rewards are among them."""
    page = shown(beam(), color_scheme=scheme).page
    page.get_by_role("button", name="Unfold all").click()
    page.wait_for_selector(".card >> text=Nothing to do.")
    page.locator(".card", has_text="First, 3").click()
    page.wait_for_selector("aside .token")
    ratios = {}
    for query in (
        ".says",
        ".facts > *",
        "aside td",
        "aside th",
        "aside .token",
        "button",
        ".legend span",
        "h1",
        ".summary *",
    ):
        for element in page.locator(query).all():
            if element.is_visible():
                ratios[query, element.inner_text()[:30]] = element.evaluate(CONTRAST)
    assert len(ratios) > 40
    assert {key: ratio for key, ratio in ratios.items() if ratio < 4.5} == {}


def test_everything_that_can_be_used_has_a_name(shown: Open) -> None:
    page = shown(beam(), beam(name="best of n")).page
    page.wait_for_selector(".pane >> nth=1")
    snapshot = page.locator("body").aria_snapshot()
    assert re.search(r"^\s*- (button|textbox|combobox|searchbox|tree|treeitem)\s*(\[.*)?:?$", snapshot, re.M) is None
    for name in ('tree "Tree 1"', 'searchbox "Filter steps by their text"', 'combobox "Tree 2"', "complementary"):
        assert name in snapshot


def test_light_and_dark_can_be_chosen(shown: Open) -> None:
    page = shown(beam(), color_scheme="light").page
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(ground) != before
    page.get_by_role("button", name="Light colours").click()
    assert page.evaluate(ground) == before


def test_step_scores_are_coloured_about_the_middle(shown: Open) -> None:
    tree, _ = beam_tree()
    for node, score in zip(tree.nodes[1:], (0.9, 0.1, 0.2, 0.05, 1.0, 0.4), strict=True):
        rewards = np.zeros(max(2, len(node.token_ids)), np.float32)
        rewards[-1] = score
        node.set_rewards("prm", rewards, score, list(range(len(rewards))))
    page = shown(PageTree.of(tree, "scores")).page
    assert page.locator(".legend").inner_text().startswith("step score")
