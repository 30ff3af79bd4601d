/** The cards of a tree: a step, or the folded children of one. */

import { type Scale, strength, tint } from "./colour";
import type { Tree } from "./data";
import { h } from "./dom";
import type { Item } from "./layout";
import { brief, integer, isNumber, plural, signed } from "./text";

export interface CardLook {
  tree: Tree;
  scorer: number;
  scale: Scale;
  selected: boolean;
  expanded: boolean | null; // null: nothing below
  hidden: number; // steps below that are not shown
  words: string; // of the filter
  id: string;
}

const CLIPPED = 150;

export function stepCard(item: Item, look: CardLook): HTMLElement {
  const { tree, scorer, scale } = look;
  const step = item.step;
  const own = tree.scorers[scorer];
  const reward = own?.reward[step] ?? null;
  const finish = tree.finish[step];
  const text = step === 0 ? (tree.promptText ? brief(tree.promptText, CLIPPED) : "…") : brief(tree.text[step], CLIPPED);
  const classes = ["card"];
  if (step === 0) classes.push("root");
  if (tree.onPath[step]) classes.push("chosen");
  if (!tree.kept[step]) classes.push("pruned");
  if (tree.rollout.has(step)) classes.push("rollout");
  if (look.selected) classes.push("selected");
  const card = h(
    "div",
    {
      class: classes.join(" "), role: "treeitem", id: look.id, "aria-level": item.level, "aria-setsize": item.setSize,
      "aria-posinset": item.place, "aria-selected": look.selected ? "true" : "false",
      "aria-expanded": look.expanded === null ? null : String(look.expanded), "aria-label": nameOf(tree, scorer, step, text),
      "data-step": String(step),
    },
    h("div", { class: "says", dir: "auto" }, ...marked(text, look.words)),
    facts(tree, scorer, step, finish),
  );
  const part = step === 0 ? null : strength(reward, scale);
  card.style.setProperty("--tint", tint(part, 20, "var(--card)"));
  card.style.setProperty("--bar", step === 0 ? "var(--line)" : tint(part, 100, "var(--zero)"));
  if (typeof reward === "string") card.classList.add("strange");
  if (look.expanded !== null) {
    const sign = look.expanded ? "−" : look.hidden ? `+${short(look.hidden)}` : "+";
    card.append(h("span", { class: "toggle", "aria-hidden": "true", "data-toggle": "" }, sign));
  }
  return card;
}

export function foldCard(item: Item, look: CardLook): HTMLElement {
  const { tree, scorer } = look;
  const steps = item.folded ?? [];
  const rewards = steps.map((step) => tree.scorers[scorer]?.reward[step]).filter(isNumber);
  const best = rewards.length ? `, best ${signed(Math.max(...rewards.slice(0, 10_000)))}` : "";
  const lost = steps.every((step) => !tree.kept[step]);
  const words = `${integer(steps.length)} ${lost ? (tree.running ? "set aside" : "pruned") : "more"}`;
  return h(
    "div",
    {
      class: `fold${look.selected ? " selected" : ""}`, role: "treeitem", id: look.id, "aria-level": item.level,
      "aria-setsize": item.setSize, "aria-posinset": item.place, "aria-expanded": "false",
      "aria-selected": look.selected ? "true" : "false", "aria-label": `${words}${best}: show them`, "data-fold": String(item.step),
    },
    h("span", { class: "stack", "aria-hidden": "true" }, "⋯"),
    h("span", {}, words),
    h("span", { class: "muted" }, best.slice(2)),
  );
}

function facts(tree: Tree, scorer: number, step: number, finish: string | null): HTMLElement {
  if (step === 0) return h("div", { class: "facts" }, h("span", {}, plural(tree.size - 1, "step")));
  const own = tree.scorers[scorer];
  const reward = own?.reward[step];
  return h(
    "div",
    { class: "facts" },
    own ? h("b", { class: isNumber(reward) && reward < 0 ? "minus" : "plus" }, signed(reward)) : null,
    own ? h("span", {}, `q ${signed(own.q[step])}`) : null,
    tree.count[step] > 1 ? h("span", { class: "count" }, `×${integer(tree.count[step])}`) : null,
    tree.rollout.has(step) ? h("span", {}, "rollout") : null,
    finish === "stop" ? h("span", { class: "end" }, "end") : null,
    finish === "length" || finish === "budget" ? h("span", { class: "end" }, `cut: ${finish}`) : null,
  );
}

/** What a screen reader says of a step. */
function nameOf(tree: Tree, scorer: number, step: number, text: string): string {
  if (step === 0) return `Prompt: ${text}. ${plural(tree.size - 1, "step")}`;
  const own = tree.scorers[scorer];
  const parts = [text];
  if (own) parts.push(`reward ${signed(own.reward[step])}`, `q ${signed(own.q[step])}`);
  if (tree.count[step] > 1) parts.push(`drawn ${tree.count[step]} times`);
  if (tree.onPath[step]) parts.push(tree.guessed ? "on the path of the best value" : "on the chosen path");
  if (!tree.kept[step]) parts.push(tree.running ? "set aside" : "pruned");
  if (tree.finish[step] === "stop") parts.push("end of the response");
  if (tree.finish[step] === "length" || tree.finish[step] === "budget") parts.push(`cut by the ${tree.finish[step]}`);
  return parts.join(", ");
}

/** Text with the words of the filter marked. */
export function marked(text: string, words: string): (Node | string)[] {
  const lower = text.toLowerCase();
  const wanted = words.toLowerCase();
  if (!wanted || lower.length !== text.length) return [text];
  const parts: (Node | string)[] = [];
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, at), h("mark", {}, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  parts.push(text.slice(from));
  return parts;
}

function short(count: number): string {
  return count < 1000 ? String(count) : count < 1e6 ? `${Math.round(count / 1000)}k` : `${Math.round(count / 1e6)}M`;
}
