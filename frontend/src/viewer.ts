/** The page of `prm-search view`: trees of files, one or two at a time. */

import { type RawTree, Tree } from "./data";
import { button, h } from "./dom";
import { Frame } from "./frame";
import type { Pane } from "./pane";
import { brief, integer, plural, signed, visible } from "./text";

export interface ViewData {
  version: number;
  title: string;
  folded: number;
  notes: string[];
  trees: RawTree[];
}

const WIDE = 1100; // pixels; two trees are shown at once from there on

export function view(app: HTMLElement, data: ViewData): void {
  const frame = new Frame(data.folded);
  const made: (Tree | undefined)[] = [];
  const treeAt = (place: number): Tree => (made[place] ??= new Tree(data.trees[place]));
  const compare = button("Compare", () => setCompared(slots.length === 1), { "aria-pressed": "false", class: "compare" });
  const slots: Slot[] = [];

  class Slot {
    readonly pane: Pane;
    readonly root: HTMLElement;
    private readonly scorers = h("select", { "aria-label": "Scorer", onchange: () => this.score() });
    private readonly trees: HTMLSelectElement;
    private readonly summary = h("p", { class: "summary", dir: "auto" });

    constructor(private place: number, scorer: number) {
      const label = `Tree ${slots.length + 1}`;
      this.pane = frame.addPane(treeAt(place), label);
      this.trees = h("select", { "aria-label": label, onchange: () => this.open(this.trees.selectedIndex) });
      for (const tree of data.trees) this.trees.append(h("option", {}, visible(tree.name)));
      const step = (by: number) => () => this.open((this.place + by + data.trees.length) % data.trees.length);
      const several = data.trees.length > 1;
      const head = h(
        "div", { class: "pane-head" },
        several ? button("‹", step(-1), { "aria-label": `${label}: the one before` }) : null,
        this.trees,
        several ? button("›", step(1), { "aria-label": `${label}: the next one` }) : null,
        this.scorers,
      );
      if (!several) this.trees.replaceWith(h("span", { class: "name", dir: "auto" }, visible(data.trees[0].name)));
      this.root = h("section", { class: "pane", "aria-label": label }, head, this.summary, this.pane.root);
      this.open(place, scorer);
    }

    open(place: number, scorer = 0): void {
      this.place = place;
      const tree = treeAt(place);
      this.trees.selectedIndex = place;
      this.scorers.replaceChildren(...tree.scorers.map((one) => h("option", {}, visible(one.name))));
      this.scorers.hidden = tree.scorers.length < 2;
      this.pane.open(tree, scorer);
      this.scorers.selectedIndex = this.pane.scorer;
      this.summary.replaceChildren(...summary(tree));
      frame.rescale();
      frame.show(this.pane, 0);
    }

    private score(): void {
      this.pane.scorer = this.scorers.selectedIndex;
      frame.rescale();
      frame.show(this.pane, this.pane.selected ?? 0);
    }
  }

  function setCompared(two: boolean): void {
    compare.setAttribute("aria-pressed", String(two));
    app.classList.toggle("compared", two);
    if (two) {
      const [tree, scorer] = partner(data.trees, frame.panes[0].tree, slots[0] ? slotPlace() : 0);
      slots.push(new Slot(tree, scorer));
      frame.area.append(slots[1].root);
    } else {
      const gone = slots.pop()!;
      gone.root.remove();
      frame.dropPane(gone.pane);
      frame.refresh();
    }
  }

  function slotPlace(): number {
    return made.indexOf(frame.panes[0].tree);
  }

  slots.push(new Slot(0, 0));
  frame.area.append(slots[0].root);
  const canCompare = data.trees.length > 1 || treeAt(0).scorers.length > 1;
  const tools = frame.tools();
  if (canCompare) tools.querySelector(".group")!.prepend(compare);
  app.replaceChildren(
    h("header", { class: "head" }, h("h1", { dir: "auto" }, visible(data.title)), tools),
    ...data.notes.map((note) => h("p", { class: "note banner" }, visible(note))),
    h("main", { class: "main" }, frame.area, frame.aside),
    frame.footer(),
  );
  if (canCompare && window.innerWidth >= WIDE && alike(data.trees)) setCompared(true);
  frame.show(frame.panes[0], 0);
}

/** Two trees of one prompt: they are there to be compared. */
function alike(trees: RawTree[]): boolean {
  return trees.length === 2 && promptOf(trees[0]) === promptOf(trees[1]);
}

/** What stands beside a tree: another tree of the same prompt, the same tree by another scorer, or the next tree. */
function partner(trees: RawTree[], tree: Tree, place: number): [number, number] {
  const same = trees.findIndex((other, at) => at > place && promptOf(other) === promptOf(trees[place]));
  if (same >= 0) return [same, 0];
  if (tree.scorers.length > 1) return [place, 1];
  return [(place + 1) % trees.length, 0];
}

/** One line on a tree: its answer, what it was ranked by, what it cost. */
function summary(tree: Tree): (Node | string)[] {
  const parts: string[] = [];
  const end = tree.chosen;
  if (end !== null) parts.push(`value ${signed(tree.value[end])}`);
  parts.push(plural(tree.size - 1, "step"));
  const sampled = Object.values(tree.usage.sampled_tokens ?? {}).reduce((sum, tokens) => sum + tokens, 0);
  if (sampled) parts.push(`${integer(sampled)} tokens sampled`);
  const answer = tree.facts.find(([name]) => name === "answer")?.[1] ?? (end === null ? "" : tree.pathText(end));
  return [h("b", { dir: "auto" }, brief(answer, 120)), h("span", {}, parts.join("  ·  "))];
}

function promptOf(tree: RawTree): string {
  return JSON.stringify(tree.prompt);
}
