/** The box beside the pointer: a step's tokens with their rewards. */

import { h } from "./dom";
import type { Pane } from "./pane";
import { brief, integer, signed } from "./text";
import { hasTokens, tokenText } from "./tokens";

const MOST = 400; // tokens

export class Popover {
  private readonly box = h("div", { class: "popover", "aria-hidden": "true", hidden: true });
  private timer = 0;

  constructor() {
    document.body.append(this.box);
  }

  /** Show a step beside its card; nothing where there is none. */
  show(pane: Pane, step: number | null, card: HTMLElement | null): void {
    window.clearTimeout(this.timer);
    if (step === null || step === 0 || !card) {
      this.box.hidden = true;
      return;
    }
    this.timer = window.setTimeout(() => this.fill(pane, step, card), 90);
  }

  private fill(pane: Pane, step: number, card: HTMLElement): void {
    if (!card.isConnected) return;
    const { tree, scorer } = pane;
    const own = tree.scorers[scorer];
    const text = own && hasTokens(tree, scorer, step)
      ? tokenText(tree, scorer, step, pane.scale, MOST)
      : h("div", { class: "text", dir: "auto" }, brief(tree.text[step], 900));
    const words = [
      ...(own ? [`reward ${signed(own.reward[step])}`, `q ${signed(own.q[step])}`] : []),
      `value ${signed(tree.value[step])}`, `${integer(tree.tokens[step])} tokens`,
    ];
    this.box.replaceChildren(text, h("p", { class: "muted" }, words.join("  ·  ")));
    this.box.hidden = false;
    const at = card.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = this.box;
    const under = at.bottom + 8 + offsetHeight < window.innerHeight;
    this.box.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - offsetWidth - 8))}px`;
    this.box.style.top = `${under ? at.bottom + 8 : Math.max(8, at.top - offsetHeight - 8)}px`;
  }
}
