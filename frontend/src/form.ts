/** The form of a search: a prompt, a strategy with its options, steps, and how tokens are drawn. */

import { h } from "./dom";
import type { Fields } from "./snippets";

type Plain = number | boolean | string | null;

export interface LiveData {
  version: number;
  chat: boolean;
  strategies: Record<string, Record<string, { kind: string; default: Plain }>>;
  values: string[];
  selects: string[];
  answers: string[];
}

type Control = HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement;

let fields = 0;

export class SearchForm {
  readonly root = h("form", { class: "form", novalidate: "" });
  readonly go = h("button", { type: "submit", class: "primary" }, "Search");
  readonly stop = h("button", { type: "button", disabled: true }, "Stop");
  readonly alert = h("p", { class: "alert", role: "alert", hidden: true });
  readonly key: HTMLInputElement;
  readonly keyRow: HTMLElement;
  readonly model = h("select");
  readonly more = h("details", { class: "more" });
  private readonly controls = new Map<string, Control>();
  private readonly options = h("div", { class: "row", role: "group", "aria-label": "Options of the strategy" });
  private readonly prompt = h("textarea", { rows: 4, spellcheck: false, dir: "auto", placeholder: "A question" });
  private readonly kind = h("select", {}, h("option", { value: "text" }, "plain text"), h("option", { value: "chat" }, "a chat message"));
  private readonly strategy = h("select");

  constructor(private readonly data: LiveData) {
    this.kind.value = data.chat ? "chat" : "text";
    for (const name of Object.keys(data.strategies)) this.strategy.append(h("option", {}, name));
    this.strategy.value = "beam";
    this.strategy.addEventListener("change", () => this.showOptions());
    this.key = h("input", { type: "password", autocomplete: "off" });
    this.keyRow = this.field("API key", this.key, "api_key");
    this.keyRow.hidden = true;
    const number = (placeholder: string, props: Record<string, unknown> = {}): HTMLInputElement =>
      h("input", { type: "number", step: "any", placeholder, ...props });
    const choice = (names: string[], none: string): HTMLSelectElement =>
      h("select", {}, h("option", { value: "" }, none), ...names.map((name) => h("option", {}, name)));
    this.root.append(
      this.keyRow,
      this.field("Prompt", this.prompt, "prompt"),
      this.field("Strategy", this.strategy, "prm_guidance.strategy"),
      this.options,
      this.alert,
      h("div", { class: "actions" }, this.go, this.stop),
    );
    this.more.append(
      h("summary", {}, "Steps, sampling, choice"),
      h("div", { class: "row" },
        this.field("Sent as", this.kind, "kind"), this.field("Model", this.model, "model"),
        this.field("Steps end with", h("input", { placeholder: "the server's", autocomplete: "off" }), "prm_guidance.steps.delimiter"),
        this.field("Tokens of a step", number("the server's", { min: 1 }), "prm_guidance.steps.max_tokens"),
        this.field("Tokens of the answer", number("256", { min: 1 }), "max_tokens"),
        this.field("Temperature", number("1"), "temperature"),
        this.field("Seed", number("a new one", { min: 0 }), "seed"),
        this.field("Rank by", choice(data.values, "the scorer's"), "prm_guidance.value"),
        this.field("Choose", choice(data.selects, "best"), "prm_guidance.select"),
        this.field("Votes are for", choice(data.answers, "the whole text"), "prm_guidance.answer"),
        this.field("Budget, tokens", number("none", { min: 1 }), "prm_guidance.budget")),
    );
    this.showOptions();
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.root.requestSubmit();
    });
  }

  /** The request, but for how it is answered. A seed is drawn here where none is given, so that it can be told. */
  body(): Fields {
    const guidance: Fields = { strategy: this.strategy.value };
    const steps: Fields = {};
    const body: Fields = { max_tokens: 256, temperature: 1 };
    for (const [param, control] of this.controls) {
      const value = read(control);
      if (value === null || ["prompt", "kind", "api_key", "prm_guidance.strategy"].includes(param)) continue;
      if (param.startsWith("prm_guidance.steps.")) steps[param.slice(19)] = param.endsWith("delimiter") ? unescaped(String(value)) : value;
      else if (param.startsWith("prm_guidance.")) guidance[param.slice(13)] = value;
      else body[param] = value;
    }
    if (Object.keys(steps).length) guidance.steps = steps;
    if (body.seed === undefined) body.seed = Math.floor(Math.random() * 2 ** 31);
    const text = this.prompt.value;
    return { ...this.asked(text), ...body, prm_guidance: guidance };
  }

  get path(): string {
    return this.kind.value === "chat" ? "chat/completions" : "completions";
  }

  get promptText(): string {
    return this.prompt.value;
  }

  get role(): string {
    return this.kind.value === "chat" ? "user" : "";
  }

  /** Say what is wrong, beside the field that is at fault. */
  refuse(message: string, param: string | null): void {
    this.alert.textContent = message;
    this.alert.hidden = false;
    const known = param === "messages" ? "prompt" : param;
    const control = known === null ? undefined : this.controls.get(known);
    if (control && this.more.contains(control)) this.more.open = true;
    control?.setAttribute("aria-invalid", "true");
    control?.focus();
  }

  forgive(): void {
    this.alert.hidden = true;
    for (const control of this.controls.values()) control.removeAttribute("aria-invalid");
  }

  private asked(text: string): Fields {
    return this.kind.value === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  }

  private showOptions(): void {
    const own = this.data.strategies[this.strategy.value];
    for (const param of [...this.controls.keys()]) if (this.controls.get(param)!.dataset.own !== undefined) this.controls.delete(param);
    this.options.replaceChildren(
      ...Object.entries(own).map(([name, { kind, default: standard }]) => {
        const control = kind === "bool"
          ? h("select", {}, h("option", { value: "" }, String(standard)), h("option", { value: standard ? "false" : "true" }, String(!standard)))
          : h("input", { type: kind === "text" ? "text" : "number", step: "any", placeholder: standard === null ? "none" : String(standard) });
        control.dataset.own = kind;
        return this.field(name.replaceAll("_", " "), control, `prm_guidance.${name}`);
      }),
    );
  }

  private field(label: string, control: Control, param: string): HTMLElement {
    control.id = `field${++fields}`;
    this.controls.set(param, control);
    return h("div", { class: "field" }, h("label", { for: control.id }, label), control);
  }
}

/** What a control holds; null where that is nothing. */
function read(control: Control): Plain {
  const text = control.value;
  if (text === "" || (control instanceof HTMLInputElement && control.validity.badInput)) return null;
  if (control.dataset.own === "bool") return text === "true";
  return control instanceof HTMLInputElement && control.type === "number" ? Number(text) : text;
}

/** \n and \t as they are meant. */
function unescaped(text: string): string {
  return text.replace(/\\([nt\\])/g, (_, letter: string) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]!);
}
