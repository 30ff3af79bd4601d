/** The page of a server: a search is begun here, and its tree grows as the server tells its steps. */

import { type ToldStep, Tree } from "./data";
import { costTable } from "./detail";
import { button, copy, h } from "./dom";
import { type LiveData, SearchForm } from "./form";
import { Frame } from "./frame";
import type { Pane } from "./pane";
import { asCurl, asPython } from "./snippets";
import { address, checked, headers, Refused, search, type Told } from "./stream";
import { plural, signed } from "./text";

const FOLDED = 5_000;
const SPENT = ["sampled_tokens", "encoded_tokens", "forward_calls", "seconds"];

export function live(app: HTMLElement, data: LiveData): void {
  const frame = new Frame(FOLDED);
  const form = new SearchForm(data);
  const pane = frame.addPane(Tree.empty([{ role: "", text: "" }]), "The search");
  const costs = h("div", { class: "live-costs" });
  const state = h("p", { class: "state", role: "status" }, "Type a prompt, and search.");
  const snippets = new Snippets(() => [address(form.path), form.body(), form.key.value !== ""]);
  let running: AbortController | null = null;

  const copies = h("div", { class: "actions" }, snippets.button("Copy as curl", asCurl), snippets.button("Copy as Python", asPython));
  form.stop.addEventListener("click", () => running?.abort());
  form.root.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) void run();
  });
  form.key.addEventListener("change", () => void listModels(form));

  async function run(): Promise<void> {
    form.forgive();
    const abort = (running = new AbortController());
    const growth = new Growth(pane, form, (tree) => {
      costs.replaceChildren(costTable(tree.usage, SPENT) ?? "");
      state.textContent = `Searching: ${plural(tree.size - 1, "step")}`;
      frame.rescale();
      frame.refresh();
    });
    form.go.disabled = true;
    form.stop.disabled = false;
    state.textContent = "Searching";
    frame.clearFilter();
    frame.show(pane, 0);
    const body = form.body();
    snippets.last = [address(form.path), body, form.key.value !== ""];
    const guidance = { ...(body.prm_guidance as object), progress: true };
    try {
      await search(form.path, { ...body, prm_guidance: guidance, stream: true }, form.key.value, abort.signal, (told) => growth.hear(told));
      state.textContent = growth.end("finished");
    } catch (error) {
      const stopped = abort.signal.aborted;
      state.textContent = growth.end(stopped ? "stopped by you" : "failed");
      if (error instanceof Refused) {
        if (error.refusal.status === 401) form.keyRow.hidden = false;
        form.refuse(error.refusal.message, error.refusal.status === 401 ? "api_key" : error.refusal.param);
      } else if (!stopped) form.refuse(String((error as Error).message), null);
    } finally {
      running = null;
      form.go.disabled = false;
      form.stop.disabled = true;
      frame.rescale();
      frame.refresh();
    }
  }

  app.classList.add("live");
  app.replaceChildren(
    h("header", { class: "head" }, h("h1", {}, "prm-search"), frame.tools()),
    h("main", { class: "main" },
      h("section", { class: "side", "aria-label": "A search" }, form.root, state, costs, copies, form.more, snippets.dialog),
      frame.area, frame.aside),
    frame.footer(),
  );
  frame.area.append(h("section", { class: "pane", "aria-label": "Tree" }, pane.root));
  frame.rescale();
  void listModels(form);
}

/** What the server has told, put into the tree once a frame. */
class Growth {
  private readonly tree: Tree;
  private steps: ToldStep[] = [];
  private waiting = 0;

  constructor(private readonly pane: Pane, form: SearchForm, private readonly shown: (tree: Tree) => void) {
    this.tree = Tree.empty([{ role: form.role, text: form.promptText }]);
    pane.open(this.tree);
  }

  hear(told: Told): void {
    if (told.usage) this.tree.usage = told.usage;
    if (told.steps) this.steps.push(...told.steps);
    if (told.stopped !== undefined) {
      this.flush();
      this.tree.chosen = this.tree.placeOf(told.path?.at(-1) ?? -1) ?? null;
      this.tree.facts = [["stopped", told.stopped], ...(told.answer ? [["answer", told.answer] as [string, string]] : [])];
    }
    this.waiting ||= requestAnimationFrame(() => this.flush());
  }

  /** The search is over. Returns what to say. */
  end(how: string): string {
    cancelAnimationFrame(this.waiting);
    const tree = this.tree;
    tree.running = false;
    if (!tree.facts.length) tree.facts = [["stopped", how]];
    this.flush();
    tree.derive();
    this.pane.changed();
    if (tree.chosen !== null) this.pane.select(tree.chosen, true);
    const value = tree.chosen === null ? "" : `, value ${signed(tree.value[tree.chosen])}`;
    return `${how[0].toUpperCase()}${how.slice(1)}: ${plural(tree.size - 1, "step")}${value}`;
  }

  private flush(): void {
    this.waiting = 0;
    const steps = this.steps;
    this.steps = [];
    if (!steps.length) return;
    this.tree.grow(steps);
    this.pane.scorer = 0;
    this.pane.changed();
    this.pane.follow(this.tree.size - 1);
    this.shown(this.tree);
  }
}

/** Fill in the models' names; a server with keys asks for one. */
async function listModels(form: SearchForm): Promise<void> {
  try {
    const response = await checked(await fetch(address("models"), { headers: headers(form.key.value) }));
    const models = ((await response.json()) as { data: { id: string }[] }).data;
    form.model.replaceChildren(...models.map((model) => h("option", {}, model.id)));
    form.forgive();
  } catch (error) {
    if (error instanceof Refused && error.refusal.status === 401) {
      form.keyRow.hidden = false;
      form.refuse("This server asks for an API key.", "api_key");
    } else form.refuse(`The models cannot be listed: ${(error as Error).message}`, null);
  }
}

type Request = [url: string, body: ReturnType<SearchForm["body"]>, withKey: boolean];

/** The request as code, in a dialog: also where a page may not write to the clipboard. */
class Snippets {
  last: Request | null = null; // the search that is shown, with its seed
  private readonly code = h("pre", { class: "code", tabIndex: 0 });
  private readonly copied = h("span", { class: "muted", role: "status" });
  readonly dialog: HTMLDialogElement;

  constructor(private readonly now: () => Request) {
    this.dialog = h("dialog", { "aria-label": "The request as code" }, this.code,
      h("div", { class: "actions" },
        button("Copy", async () => (this.copied.textContent = (await copy(this.code.textContent!)) ? "Copied" : "Select it and copy by hand"), { class: "primary" }),
        button("Close", () => this.dialog.close()), this.copied));
  }

  button(label: string, write: (...request: Request) => string): HTMLButtonElement {
    return button(label, async () => {
      const request = this.now();
      const { seed: drawn, ...asked } = request[1];
      const { seed, ...before } = this.last?.[1] ?? {};
      const same = JSON.stringify({ ...before, seed: 0 }) === JSON.stringify({ ...asked, seed: 0 });
      request[1].seed = same && seed !== undefined ? seed : drawn;
      this.code.textContent = write(...request);
      this.copied.textContent = "";
      this.dialog.showModal();
      if (await copy(this.code.textContent)) this.copied.textContent = "Copied";
    });
  }
}
