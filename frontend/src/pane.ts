/** One tree on the screen. Only cards near what is seen are in the document, so thousands of steps stay quick. */

import { foldCard, stepCard } from "./card";
import { type Scale, scaleOf } from "./colour";
import type { Tree } from "./data";
import { h, svg } from "./dom";
import { type Folding, HEIGHT, type Item, layout } from "./layout";
import { plural } from "./text";

const MATCHES = 2_000; // of a filter that are shown
const MARGIN = 300; // pixels around what is seen that are drawn too
const LEAST = 0.25; // zoom
const READABLE = 0.88;
const MOST = 1.6;

export interface PaneEvents {
  selected(pane: Pane, step: number): void;
  pointed(pane: Pane, step: number | null, card: HTMLElement | null): void;
  told(words: string): void;
}

let panes = 0;

export class Pane {
  readonly root: HTMLElement;
  readonly scroller: HTMLElement;
  tree: Tree;
  scorer = 0;
  scale: Scale;
  selected: number | null = null;
  outline: boolean;
  zoom = 1;
  matched: number[] = [];
  private words = "";
  private readonly closed = new Set<number>();
  private readonly opened = new Set<number>();
  private only: Set<number> | null = null;
  private focused = "s0"; // key of the item that keys move
  private items: Item[] = [];
  private byKey = new Map<string, Item>();
  private readonly cards = new Map<string, HTMLElement>();
  private readonly stage: HTMLElement;
  private readonly sizer: HTMLElement;
  private readonly links: SVGElement;
  private readonly name = `t${++panes}`;
  private waiting = false;

  constructor(
    tree: Tree, outline: boolean, label: string, private readonly folded: number, private readonly events: PaneEvents,
  ) {
    this.tree = tree;
    this.outline = outline;
    this.scale = scaleOf([tree.scorers[0]]);
    this.links = svg("svg", { class: "links", "aria-hidden": "true" });
    this.stage = h("div", { class: "stage", role: "none" });
    this.stage.append(this.links);
    this.sizer = h("div", { class: "sizer", role: "none" }, this.stage);
    this.scroller = h("div", { class: "scroller", role: "tree", tabIndex: 0, "aria-label": label }, this.sizer);
    this.root = h("div", { class: "tree" }, this.scroller);
    this.scroller.addEventListener("scroll", () => this.later());
    this.scroller.addEventListener("click", (event) => this.clicked(event));
    this.scroller.addEventListener("keydown", (event) => this.pressed(event));
    this.scroller.addEventListener("pointerover", (event) => this.pointed(event));
    this.scroller.addEventListener("pointerleave", () => this.events.pointed(this, null, null));
    this.scroller.addEventListener("wheel", (event) => this.wheeled(event), { passive: false });
    new ResizeObserver(() => (this.outline ? this.arrange() : this.later())).observe(this.scroller);
    this.open(tree);
  }

  /** Show a tree from its beginning. */
  open(tree: Tree, scorer = 0): void {
    this.tree = tree;
    this.scorer = Math.min(scorer, Math.max(0, tree.scorers.length - 1));
    this.scale = scaleOf([tree.scorers[this.scorer]]);
    this.selected = null;
    this.focused = "s0";
    this.opened.clear();
    this.closed.clear();
    if (tree.size > this.folded) this.foldAll();
    this.filter(this.words);
    this.scroller.scrollTo(0, 0);
    requestAnimationFrame(() => this.fit(READABLE));
  }

  /** The tree has grown or ended. */
  changed(): void {
    this.scale = scaleOf([this.tree.scorers[this.scorer]]);
    this.filter(this.words);
  }

  get folding(): Folding {
    return { closed: this.closed, opened: this.opened, only: this.only };
  }

  /** Fold everything but the chosen path. */
  foldAll(): void {
    this.opened.clear();
    this.tree.children.forEach((children, step) => {
      if (step && children.length && !this.tree.onPath[step]) this.closed.add(step);
    });
    this.arrange();
  }

  foldPruned(): void {
    this.opened.clear();
    this.closed.clear();
    this.arrange();
  }

  expandAll(): void {
    this.closed.clear();
    this.tree.children.forEach((children, step) => children.length && this.opened.add(step));
    this.arrange();
  }

  /** Show only the steps whose text holds the words, and those above them. Returns how many there are. */
  filter(words: string): number {
    this.words = words.trim();
    this.matched = this.words ? this.tree.matches(this.words) : [];
    this.only = null;
    if (this.words) {
      this.only = new Set([0]);
      for (const match of this.matched.slice(0, MATCHES))
        for (let at = match; at > 0 && !this.only.has(at); at = this.tree.parent[at]) this.only.add(at);
    }
    this.arrange();
    return this.matched.length;
  }

  /** Select the next match after the one that is selected. */
  nextMatch(): void {
    const shown = this.matched.slice(0, MATCHES);
    if (!shown.length) return;
    const after = shown.find((step) => step > (this.selected ?? 0)) ?? shown[0];
    this.select(after, true);
  }

  /** Scroll so that a step is seen, where it is shown. */
  follow(step: number): void {
    this.bring(`s${step}`);
  }

  setScale(scale: Scale): void {
    this.scale = scale;
    this.redraw();
  }

  setOutline(outline: boolean): void {
    this.outline = outline;
    this.scroller.classList.toggle("outline", outline);
    this.arrange();
    if (this.selected !== null) this.bring(`s${this.selected}`);
    else this.toRoot();
  }

  setZoom(zoom: number): void {
    const before = this.zoom;
    const { scrollLeft, scrollTop, clientWidth, clientHeight } = this.scroller;
    this.zoom = Math.min(MOST, Math.max(LEAST, zoom));
    this.resize();
    const by = this.zoom / before;
    this.scroller.scrollTo(
      (scrollLeft + clientWidth / 2) * by - clientWidth / 2, (scrollTop + clientHeight / 2) * by - clientHeight / 2,
    );
    this.later();
  }

  /** Zoom so that the whole tree is seen, as far as that can be read at all. */
  fit(least = LEAST): void {
    const [width, height] = this.extent();
    this.zoom = Math.max(least, Math.min(1, this.scroller.clientWidth / width, this.scroller.clientHeight / height));
    this.resize();
    this.toRoot();
  }

  /** Select a step, unfolding what hides it. */
  select(step: number, scroll: boolean): void {
    if (!this.byKey.has(`s${step}`)) {
      for (const at of this.tree.path(step)) {
        const parent = this.tree.parent[at];
        this.closed.delete(parent);
        if (!this.byKey.has(`s${at}`)) this.opened.add(parent);
      }
      this.arrange();
    }
    this.selected = step;
    this.focused = `s${step}`;
    if (scroll) this.bring(this.focused);
    this.redraw();
    this.events.selected(this, step);
  }

  toggle(step: number): void {
    if (!this.tree.children[step].length) return;
    if (this.isOpen(step)) {
      this.opened.delete(step);
      this.closed.add(step);
    } else if (this.closed.has(step)) this.closed.delete(step);
    this.arrange();
    const now = plural(this.items.length, "line");
    this.events.told(`${this.isOpen(step) ? "Unfolded" : "Folded"}; ${now}`);
  }

  unfold(step: number): void {
    this.opened.add(step);
    this.arrange();
  }

  private isOpen(step: number): boolean {
    return this.only !== null || !this.closed.has(step);
  }

  // --- drawing ----------------------------------------------------------------------------------------------------

  /** Lay the shown steps out anew. */
  arrange(): void {
    this.items = layout(this.tree, this.folding, this.outline ? this.scroller.clientWidth || 360 : null);
    this.byKey = new Map(this.items.map((item) => [item.key, item]));
    if (!this.byKey.has(this.focused)) this.focused = "s0";
    this.resize();
    this.redraw();
  }

  /** Where step 0 is seen. */
  private toRoot(): void {
    const root = this.byKey.get("s0");
    if (root) this.scroller.scrollTop = (root.y + HEIGHT / 2) * this.zoom - this.scroller.clientHeight / 2;
    this.later();
  }

  private extent(): [number, number] {
    let width = 0;
    let height = 0;
    for (const item of this.items) {
      width = Math.max(width, item.x + item.width);
      height = Math.max(height, item.y + item.height);
    }
    return this.outline ? [0, height + 24] : [width + 48, height + 48];
  }

  private get scaled(): number {
    return this.outline ? 1 : this.zoom;
  }

  private resize(): void {
    const [width, height] = this.extent();
    this.sizer.style.width = this.outline ? "100%" : `${width * this.scaled}px`;
    this.sizer.style.height = `${height * this.scaled}px`;
    this.stage.style.transform = `scale(${this.scaled})`;
    this.scroller.classList.toggle("far", this.scaled < 0.5);
  }

  /** Draw all cards anew, soon. */
  redraw(): void {
    for (const card of this.cards.values()) card.remove();
    this.cards.clear();
    this.later();
  }

  private later(): void {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.paint();
    });
  }

  private paint(): void {
    const zoom = this.scaled;
    const left = this.scroller.scrollLeft / zoom - MARGIN;
    const top = this.scroller.scrollTop / zoom - MARGIN;
    const right = left + this.scroller.clientWidth / zoom + 2 * MARGIN;
    const bottom = top + this.scroller.clientHeight / zoom + 2 * MARGIN;
    const near = new Set<string>();
    const lines = new Map<string, string>();
    for (const item of this.items) {
      const seen = item.y < bottom && item.y + item.height > top && item.x < right && item.x + item.width > left;
      if (seen) near.add(item.key);
      const above = item.above;
      if (above && Math.min(above.y, item.y) < bottom && Math.max(above.y, item.y) + HEIGHT > top && above.x < right && item.x > left)
        this.line(lines, above, item);
    }
    const focused = this.byKey.get(this.focused);
    if (focused) near.add(focused.key); // what aria-activedescendant names has to be there
    for (const [key, card] of this.cards) {
      if (near.has(key)) continue;
      card.remove();
      this.cards.delete(key);
    }
    for (const key of near) if (!this.cards.has(key)) this.place(this.byKey.get(key)!);
    this.scroller.setAttribute("aria-activedescendant", `${this.name}${this.focused}`);
    this.drawLines(lines, left, top, right - left, bottom - top);
    this.scroller.dataset.drawn = String(this.cards.size);
  }

  private place(item: Item): void {
    const below = this.tree.children[item.step].length;
    const look = {
      tree: this.tree, scorer: this.scorer, scale: this.scale, words: this.words, id: `${this.name}${item.key}`,
      selected: item.folded ? item.key === this.focused : item.step === this.selected,
      expanded: below ? this.isOpen(item.step) : null,
      hidden: this.isOpen(item.step) ? 0 : this.tree.below[item.step],
    };
    const card = item.folded ? foldCard(item, look) : stepCard(item, look);
    if (item.key === this.focused) card.classList.add("focused");
    const { style } = card;
    style.left = `${item.x}px`;
    style.top = `${item.y}px`;
    style.width = `${item.width}px`;
    style.height = `${item.height}px`;
    this.cards.set(item.key, card);
    this.stage.append(card);
  }

  private line(lines: Map<string, string>, above: Item, item: Item): void {
    const step = item.folded ? item.folded[0] : item.step;
    const count = item.folded ? 1 : this.tree.count[step];
    const wide = Math.min(14, Math.round(1.5 + 2 * Math.log2(count)));
    const how = item.folded ? "folded" : this.tree.onPath[step] ? "on" : this.tree.kept[step] ? "kept" : "lost";
    const y = item.y + item.height / 2;
    let path: string;
    if (this.outline) {
      const x = Math.min(above.x + 9, item.x - 4);
      path = `M${x} ${above.y + above.height}V${y}H${item.x}`;
    } else {
      const x = above.x + above.width;
      const middle = (x + item.x) / 2 + 4;
      path = `M${x} ${above.y + above.height / 2}C${middle} ${above.y + above.height / 2} ${middle} ${y} ${item.x} ${y}`;
    }
    const key = `${how} ${wide}`;
    lines.set(key, (lines.get(key) ?? "") + path);
  }

  /** One path element for all lines of a look, in a picture of what is seen. */
  private drawLines(lines: Map<string, string>, left: number, top: number, width: number, height: number): void {
    const { style } = this.links as unknown as HTMLElement;
    style.left = `${left}px`;
    style.top = `${top}px`;
    style.width = `${width}px`;
    style.height = `${height}px`;
    this.links.setAttribute("viewBox", `${left} ${top} ${width} ${height}`);
    const order = ["lost", "folded", "kept", "on"];
    const looks = [...lines].sort(([a], [b]) => order.indexOf(a.split(" ")[0]) - order.indexOf(b.split(" ")[0]));
    this.links.replaceChildren(
      ...looks.map(([key, path]) => {
        const [how, wide] = key.split(" ");
        return svg("path", { class: how, d: path, "stroke-width": wide });
      }),
    );
  }

  // --- mouse and keys ---------------------------------------------------------------------------------------------

  /** Scroll so that an item is seen. */
  private bring(key: string): void {
    const item = this.byKey.get(key);
    if (!item) return;
    const zoom = this.scaled;
    const { clientWidth, clientHeight } = this.scroller;
    const into = (from: number, size: number, at: number, room: number): number =>
      from < at + 16 ? from - Math.min(120, room / 4) : from + size > at + room - 16 ? from + size - room + Math.min(120, room / 4) : at;
    this.scroller.scrollTo(
      this.outline ? 0 : into(item.x * zoom, item.width * zoom, this.scroller.scrollLeft, clientWidth),
      into(item.y * zoom, item.height * zoom, this.scroller.scrollTop, clientHeight),
    );
    this.later();
  }

  private clicked(event: MouseEvent): void {
    const target = event.target as HTMLElement;
    const fold = target.closest<HTMLElement>("[data-fold]");
    if (fold) {
      this.focused = `s${fold.dataset.fold}`;
      this.unfold(Number(fold.dataset.fold));
      return;
    }
    const card = target.closest<HTMLElement>("[data-step]");
    if (!card) return;
    const step = Number(card.dataset.step);
    if (target.closest("[data-toggle]")) this.toggle(step);
    else this.select(step, false);
  }

  private pointed(event: PointerEvent): void {
    if (event.pointerType === "touch") return;
    const card = (event.target as HTMLElement).closest<HTMLElement>("[data-step]");
    this.events.pointed(this, card ? Number(card.dataset.step) : null, card);
  }

  private wheeled(event: WheelEvent): void {
    if (!event.ctrlKey || this.outline) return;
    event.preventDefault();
    this.setZoom(this.zoom * Math.exp(-event.deltaY / 300));
  }

  private pressed(event: KeyboardEvent): void {
    if (event.altKey || event.metaKey || event.ctrlKey) return;
    const at = this.items.findIndex((item) => item.key === this.focused);
    const item = this.items[at];
    if (!item) return;
    const act = this.keys(item, at)[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  private keys(item: Item, at: number): Record<string, () => void> {
    const go = (to: Item | undefined | null): void => {
      if (!to) return;
      this.focused = to.key;
      this.bring(to.key);
      if (to.folded) this.redraw();
      else this.select(to.step, true);
    };
    const openHere = (): void => {
      if (item.folded) {
        this.focused = `s${item.step}`;
        this.unfold(item.step);
      } else if (!this.isOpen(item.step)) this.toggle(item.step);
      else go(this.items.find((other) => other.above === item));
    };
    return {
      ArrowDown: () => go(this.items[at + 1]),
      ArrowUp: () => go(this.items[at - 1]),
      ArrowRight: openHere,
      ArrowLeft: () => {
        const open = !item.folded && this.tree.children[item.step].length > 0 && this.isOpen(item.step) && !this.only;
        if (open) this.toggle(item.step);
        else go(item.above);
      },
      Home: () => go(this.items[0]),
      End: () => go(this.items[this.items.length - 1]),
      Enter: () => (item.folded ? openHere() : this.toggle(item.step)),
      " ": () => (item.folded ? openHere() : this.toggle(item.step)),
      "*": () => this.expandAll(),
      c: () => this.tree.chosen !== null && this.select(this.tree.chosen, true),
    };
  }
}
