/** All that is known of one step, or of the whole search where the prompt is selected. */

import type { Scale } from "./colour";
import type { Tree } from "./data";
import { h } from "./dom";
import { integer, plural, signed, visible } from "./text";
import { hasTokens, tokenText } from "./tokens";

export function detail(tree: Tree, scorer: number, scale: Scale, step: number, go: (step: number) => void): HTMLElement {
  return step === 0 ? whole(tree, go) : single(tree, scorer, scale, step, go);
}

function whole(tree: Tree, go: (step: number) => void): HTMLElement {
  const box = h("div", { class: "detail" }, h("h2", {}, "Prompt"));
  for (const message of tree.prompt) {
    if (message.role) box.append(h("h3", {}, message.role));
    box.append(h("div", { class: "text", dir: "auto" }, visible(message.text)));
  }
  if (tree.chosen !== null) {
    box.append(
      h("h2", {}, tree.guessed ? "Best value" : "Chosen"),
      h("div", { class: "text", dir: "auto" }, visible(tree.pathText(tree.chosen)).trim()),
      h("button", { type: "button", class: "link", onclick: () => go(tree.chosen!) }, "Show its last step"),
    );
    if (tree.guessed) box.append(h("p", { class: "muted" }, "The file does not say which path was chosen."));
  }
  const ended = tree.finish.filter((how) => how === "stop").length;
  const rows: [string, string][] = [
    ...tree.facts,
    ["steps", integer(tree.size - 1)],
    ["whole responses", integer(ended)],
    ["tokens in the tree", integer(tree.tokensBelow[0])],
  ];
  box.append(h("h2", {}, "Search"), table(rows));
  const costs = costTable(tree.usage);
  if (costs) box.append(h("h2", {}, "Cost"), costs);
  for (const note of tree.notes) box.append(h("p", { class: "note" }, visible(note)));
  return box;
}

function single(tree: Tree, scorer: number, scale: Scale, step: number, go: (step: number) => void): HTMLElement {
  const own = tree.scorers[scorer];
  const depth = tree.depth[step];
  const box = h("div", { class: "detail" }, h("h2", {}, `Step ${integer(depth)}`, mark(tree, step)));
  if (own && hasTokens(tree, scorer, step)) {
    const told = h("p", { class: "told muted", role: "status" }, "Point at a token for its reward and q, the sum so far.");
    box.append(tokenText(tree, scorer, step, scale, undefined, (words) => (told.textContent = words)), told);
  } else box.append(h("div", { class: "text", dir: "auto" }, visible(tree.text[step]) || "(end)"));
  const rows: [string, string][] = [];
  for (const other of tree.scorers) {
    const name = tree.scorers.length > 1 ? ` (${visible(other.name)})` : "";
    rows.push([`reward${name}`, signed(other.reward[step])], [`q${name}`, signed(other.q[step])]);
  }
  rows.push(
    ["value", signed(tree.value[step])],
    ["drawn", tree.count[step] === 1 ? "once" : `${integer(tree.count[step])} times`],
    ["ends with", ends(tree.finish[step])],
    ["tokens", integer(tree.tokens[step])],
    ["tokens up to its end", integer(tree.tokensTo[step])],
  );
  if (tree.below[step])
    rows.push(["below", plural(tree.below[step], "step")], ["tokens with those below", integer(tree.tokensBelow[step])]);
  box.append(table(rows));
  const before = tree.path(step).slice(0, -1);
  if (before.length) {
    box.append(h("h2", {}, "Path to it"));
    const list = h("ol", { class: "path" });
    for (const at of before) {
      const text = visible(tree.text[at]).trim() || "(white space)";
      const reward = own ? h("b", {}, signed(own.reward[at]) + " ") : null;
      const short = text.length > 400 ? `${text.slice(0, 399)}…` : text;
      list.append(h("li", {}, h("button", { type: "button", class: "link", dir: "auto", onclick: () => go(at) }, reward, short)));
    }
    box.append(list);
  }
  return box;
}

function mark(tree: Tree, step: number): HTMLElement | null {
  const words = tree.onPath[step] ? (tree.guessed ? "best value" : "chosen") : tree.kept[step] ? null : tree.running ? "set aside" : "pruned";
  return words ? h("span", { class: `mark ${tree.onPath[step] ? "on" : ""}` }, words) : null;
}

function ends(finish: string | null): string {
  const words: Record<string, string> = {
    step: "the step's end", stop: "the response's end", length: "the length limit", budget: "the search's budget",
  };
  return finish === null ? "–" : (words[finish] ?? finish);
}

function table(rows: [string, string][]): HTMLElement {
  const body = h("tbody");
  for (const [name, value] of rows) body.append(h("tr", {}, h("th", { scope: "row" }, name), h("td", { dir: "auto" }, visible(value))));
  return h("table", { class: "facts-table" }, body);
}

const COSTS: Record<string, string> = {
  sampled_tokens: "sampled", encoded_tokens: "encoded", reencoded_tokens: "encoded again", cached_tokens: "from cache",
  forward_calls: "forwards", seconds: "seconds",
};

/** What each model has cost: tokens, forwards, seconds. */
export function costTable(usage: Record<string, Record<string, number>>, costs = Object.keys(COSTS)): HTMLElement | null {
  const columns = costs.filter((cost) => Object.keys(usage[cost] ?? {}).length);
  if (!columns.length) return null;
  const models = [...new Set(columns.flatMap((cost) => Object.keys(usage[cost])))];
  const head = h("tr", {}, h("th", { scope: "col" }, "model"));
  for (const cost of columns) head.append(h("th", { scope: "col" }, COSTS[cost]));
  const body = h("tbody");
  for (const model of models) {
    const row = h("tr", {}, h("th", { scope: "row" }, visible(model)));
    for (const cost of columns) {
      const number = usage[cost][model];
      row.append(h("td", {}, number === undefined ? "" : cost === "seconds" ? number.toFixed(2) : integer(number)));
    }
    body.append(row);
  }
  return h("div", { class: "wide" }, h("table", { class: "costs" }, h("thead", {}, head), body));
}
