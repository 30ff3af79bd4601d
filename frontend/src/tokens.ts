/** A step's tokens, each coloured by its reward; pointing at one says its numbers. */

import { type Scale, strength, tint } from "./colour";
import type { Tree } from "./data";
import { h } from "./dom";
import { isNumber, signed, visible } from "./text";

const MOST = 20_000; // tokens of one step that are drawn

/** True where a scorer has rewarded the tokens of a step. */
export function hasTokens(tree: Tree, scorer: number, step: number): boolean {
  return (tree.scorers[scorer]?.tokenRewards[step]?.length ?? 0) > 0;
}

/** The tokens as text. `tell` gets the numbers of the one that is pointed at. */
export function tokenText(
  tree: Tree, scorer: number, step: number, scale: Scale, most = MOST, tell?: (words: string) => void,
): HTMLElement {
  const own = tree.scorers[scorer];
  const rewards = own.tokenRewards[step];
  const pieces = own.pieces[step];
  const parentQ = own.q[tree.parent[step]];
  let q = isNumber(parentQ) ? parentQ : 0;
  const box = h("div", { class: "tokens", dir: "auto" });
  const shown = Math.min(rewards.length, most);
  for (let at = 0; at < shown; at++) {
    const piece = tree.pieces[pieces[at]];
    const reward = rewards[at];
    q += isNumber(reward) ? reward : NaN;
    const text = typeof piece === "number" ? `#${piece} ` : visible(piece ?? "");
    const words = `reward ${signed(reward)}   q ${Number.isNaN(q) ? "NaN" : signed(q)}`;
    const token = h("span", { class: "token", title: words }, text || "⋮");
    token.style.background = tint(strength(reward, scale), 62, "transparent");
    if (tell) {
      token.tabIndex = 0;
      const name = `${text.trim() || "white space"}: ${words}`;
      token.addEventListener("pointerenter", () => tell(name));
      token.addEventListener("focus", () => tell(name));
    }
    box.append(token);
  }
  if (shown < rewards.length) box.append(h("span", { class: "muted" }, ` … ${rewards.length - shown} more tokens`));
  return box;
}
