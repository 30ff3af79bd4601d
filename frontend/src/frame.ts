/** What both pages have: panes beside the details of a step, the bar of buttons, the legend, light and dark. */

import { scaleOf } from "./colour";
import type { Tree } from "./data";
import { detail } from "./detail";
import { button, h } from "./dom";
import { Pane } from "./pane";
import { Popover } from "./popover";
import { integer, plural, signed } from "./text";

const NARROW = 720; // pixels

export class Frame {
  readonly panes: Pane[] = [];
  readonly area = h("div", { class: "panes" });
  readonly status = h("p", { class: "status", role: "status" });
  readonly aside = h("aside", { class: "aside", "aria-label": "Details" });
  readonly filter = h("input", {
    type: "search", class: "filter", placeholder: "Filter steps", "aria-label": "Filter steps by their text", autocomplete: "off",
  });
  private readonly popover = new Popover();
  private readonly legend = h("div", { class: "legend" });
  private readonly outlineButton: HTMLButtonElement;
  private outline = window.innerWidth < NARROW;
  private active: Pane | null = null;

  /** `folded`: steps beyond which a tree opens with all folded but the chosen path. */
  constructor(private readonly folded: number) {
    this.filter.addEventListener("input", () => this.filtered());
    this.filter.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.panes.forEach((pane) => pane.nextMatch());
      if (event.key === "Escape") this.clearFilter();
    });
    this.outlineButton = button("Outline", () => this.setOutline(!this.outline), { "aria-pressed": String(this.outline) });
    document.addEventListener("keydown", (event) => {
      const typing = /^(INPUT|TEXTAREA|SELECT)$/.test((event.target as HTMLElement).tagName);
      if (event.key !== "/" || typing || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.filter.focus();
    });
  }

  /** Buttons that act on every pane. */
  tools(): HTMLElement {
    const each = (act: (pane: Pane) => void) => () => this.panes.forEach(act);
    return h(
      "div", { class: "tools", role: "toolbar", "aria-label": "The view" },
      this.filter,
      h("div", { class: "group" }, this.outlineButton,
        button("Unfold all", each((pane) => pane.expandAll())),
        button("Fold pruned", each((pane) => pane.foldPruned())),
        button("Fold to path", each((pane) => pane.foldAll()))),
      h("div", { class: "group zoom" },
        button("−", each((pane) => pane.setZoom(pane.zoom / 1.25)), { "aria-label": "Smaller" }),
        button("+", each((pane) => pane.setZoom(pane.zoom * 1.25)), { "aria-label": "Larger" }),
        button("Fit", each((pane) => pane.fit()), { "aria-label": "Fit the tree into the window" })),
      themeButton(),
    );
  }

  footer(): HTMLElement {
    return h("footer", { class: "foot" }, this.legend, this.status);
  }

  addPane(tree: Tree, label: string): Pane {
    const pane = new Pane(tree, this.outline, label, this.folded, {
      selected: (from, step) => this.show(from, step),
      pointed: (from, step, card) => this.popover.show(from, step, card),
      told: (words) => (this.status.textContent = words),
    });
    pane.scroller.classList.toggle("outline", this.outline);
    this.panes.push(pane);
    this.active ??= pane;
    return pane;
  }

  dropPane(pane: Pane): void {
    this.panes.splice(this.panes.indexOf(pane), 1);
    if (this.active === pane) this.active = this.panes[0] ?? null;
    this.rescale();
  }

  /** One scale for all panes, so that colours can be compared. */
  rescale(): void {
    const scale = scaleOf(this.panes.map((pane) => pane.tree.scorers[pane.scorer]));
    this.panes.forEach((pane) => pane.setScale(scale));
    const [low, high] = scale.scores ? ["0", "1"] : [signed(-scale.reach), signed(scale.reach)];
    const scored = this.panes.some((pane) => pane.tree.scorers.length);
    this.legend.replaceChildren(
      ...(scored ? [h("span", {}, scale.scores ? "step score" : "step reward"), h("span", {}, low), h("i", { class: "ramp", "aria-hidden": "true" }), h("span", {}, high)] : []),
      h("span", { class: "key" }, h("i", { class: "stroke on", "aria-hidden": "true" }), "chosen path"),
      h("span", { class: "key" }, h("i", { class: "stroke thick", "aria-hidden": "true" }), "width: times drawn"),
      h("span", { class: "key keys" }, "keys: arrows, Enter folds, c the chosen end, / filters"),
    );
  }

  show(pane: Pane, step: number): void {
    this.active = pane;
    this.aside.replaceChildren(detail(pane.tree, pane.scorer, pane.scale, step, (to) => pane.select(to, true)));
    this.aside.scrollTop = 0;
  }

  /** Show the details again, of what has changed. */
  refresh(): void {
    if (this.active) this.show(this.active, this.active.selected ?? 0);
  }

  setOutline(outline: boolean): void {
    this.outline = outline;
    this.outlineButton.setAttribute("aria-pressed", String(outline));
    this.panes.forEach((pane) => pane.setOutline(outline));
  }

  clearFilter(): void {
    this.filter.value = "";
    this.filtered();
  }

  private filtered(): void {
    const words = this.filter.value;
    const found = this.panes.map((pane) => pane.filter(words));
    const told = found.map((count, at) => `${integer(count)} of ${plural(this.panes[at].tree.size - 1, "step")}`);
    this.status.textContent = words.trim() ? told.join(" and ") : "";
  }
}

/** Light, dark, or as the system has it. */
function themeButton(): HTMLElement {
  const root = document.documentElement;
  const dark = (): boolean =>
    root.dataset.theme ? root.dataset.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  const toggle = button("", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  const label = (): void => {
    toggle.textContent = dark() ? "☀" : "☾";
    toggle.setAttribute("aria-label", dark() ? "Light colours" : "Dark colours");
  };
  label();
  return h("div", { class: "group" }, toggle);
}
