/** Which steps are shown, and where: d3-hierarchy's tidy tree from left to right, or an outline. */

import { hierarchy, tree as tidy } from "d3-hierarchy";
import type { Tree } from "./data";

export const WIDTH = 224;
export const HEIGHT = 70;
const FOLD_HEIGHT = 30;
const COLUMN = WIDTH + 50;
const ROW = HEIGHT + 14;
const MANY = 60; // children of one parent that are shown before the rest is folded
const INDENT = 18;

export interface Folding {
  closed: ReadonlySet<number>; // nothing below is shown
  opened: ReadonlySet<number>; // all children are shown, pruned ones too
  only: ReadonlySet<number> | null; // a filter: these alone
}

/** What is shown at one place: a step, or the folded children of `step`. */
export interface Item {
  key: string;
  step: number;
  folded: number[] | null;
  x: number;
  y: number;
  width: number;
  height: number;
  level: number;
  above: Item | null;
  setSize: number;
  place: number;
}

interface Branch {
  item: Item;
  children: Branch[];
}

/** The shown items, parents first, in reading order. */
export function layout(tree: Tree, folding: Folding, outline: number | null): Item[] {
  const root = branch(tree, folding);
  return outline === null ? asTree(root) : asOutline(root, outline);
}

function make(step: number, folded: number[] | null, above: Item | null): Item {
  const key = folded ? `f${step}` : `s${step}`;
  const level = above === null ? 1 : above.level + 1;
  return {
    key, step, folded, above, level, x: 0, y: 0, width: WIDTH, height: folded ? FOLD_HEIGHT : HEIGHT, setSize: 1, place: 1,
  };
}

function branch(tree: Tree, folding: Folding): Branch {
  const root: Branch = { item: make(0, null, null), children: [] };
  const waiting = [root]; // no recursion: paths may be thousands of steps long
  for (let next = waiting.pop(); next; next = waiting.pop()) {
    const { item, children } = next;
    const [shown, folded] = childrenOf(tree, item.step, folding);
    for (const step of shown) children.push({ item: make(step, null, item), children: [] });
    if (folded.length) children.push({ item: make(item.step, folded, item), children: [] });
    children.forEach((child, place) => {
      child.item.setSize = children.length;
      child.item.place = place + 1;
    });
    for (const child of children) if (!child.item.folded) waiting.push(child);
  }
  return root;
}

/** The children that are shown, and those that are folded into one item. */
export function childrenOf(tree: Tree, step: number, folding: Folding): [number[], number[]] {
  const all = tree.children[step];
  const only = folding.only;
  if (only) return [all.filter((child) => only.has(child)), []];
  if (folding.closed.has(step)) return [[], []];
  if (folding.opened.has(step)) return [all, []];
  const kept = tree.kept[step] ? all.filter((child) => tree.kept[child]) : all; // who opens a pruned branch sees it
  const shown = kept.length > MANY ? kept.filter((child, place) => place < MANY || tree.onPath[child]) : kept;
  const set = new Set(shown);
  return [shown, all.length === shown.length ? [] : all.filter((child) => !set.has(child))];
}

function asTree(root: Branch): Item[] {
  const nodes = hierarchy(root, (at) => at.children);
  const placed = tidy<Branch>()
    .nodeSize([1, 1])
    .separation((a, b) => {
      const rows = (a.data.item.height + b.data.item.height) / 2 + (ROW - HEIGHT);
      return a.parent === b.parent ? rows : rows + 10;
    })(nodes);
  let top = Infinity;
  placed.each((node) => (top = Math.min(top, node.x - node.data.item.height / 2)));
  const items: Item[] = [];
  placed.eachBefore((node) => {
    const item = node.data.item;
    item.x = 24 + (item.level - 1) * COLUMN;
    item.y = 24 + node.x - item.height / 2 - top;
    if (item.folded) item.width = 190;
    items.push(item);
  });
  return items;
}

function asOutline(root: Branch, width: number): Item[] {
  const items: Item[] = [];
  const waiting = [root];
  let y = 10;
  const most = Math.max(0, Math.floor((width * 0.4) / INDENT));
  for (let next = waiting.pop(); next; next = waiting.pop()) {
    const item = next.item;
    item.x = 10 + Math.min(item.level - 1, most) * INDENT;
    item.y = y;
    item.width = item.folded ? Math.min(220, width - item.x - 12) : Math.max(150, width - item.x - 12);
    y += item.height + 6;
    items.push(item);
    for (let child = next.children.length - 1; child >= 0; child--) waiting.push(next.children[child]);
  }
  return items;
}
