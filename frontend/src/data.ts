/** A search tree in columns, and what follows from them: depth, the chosen path, what was pruned. */

import { isNumber, type Num } from "./text";

export interface Scorer {
  name: string;
  reward: Num[];
  q: Num[];
  tokenRewards: Num[][];
  pieces: number[][];
}

export interface Message {
  role: string;
  text: string;
}

export interface RawTree {
  name: string;
  prompt: Message[];
  primary: string;
  chosen: number | null;
  facts: [string, string][];
  usage: Record<string, Record<string, number>>;
  notes: string[];
  parent: number[];
  text: string[];
  tokens: (number | null)[];
  finish: (string | null)[];
  count: number[];
  value: Num[];
  rollout: number[];
  scorers: Scorer[];
  pieces: (string | number)[];
}

/** One step as a server tells it. */
export interface ToldStep {
  id: number;
  parent: number;
  text: string;
  tokens: number;
  rewards: Record<string, Num>;
  q: Num;
  value: Num;
  count: number;
  finish: string | null;
  rollout: boolean;
  pieces?: (string | number)[];
  token_rewards?: Num[];
}

/** A tree. Step 0 is the prompt; every other stands after its parent. */
export class Tree {
  name: string;
  prompt: Message[];
  primary: string;
  chosen: number | null;
  guessed = false; // `chosen` is only the finished path of the greatest value
  running = false; // more steps may come
  facts: [string, string][];
  usage: Record<string, Record<string, number>>;
  notes: string[];
  parent: number[];
  text: string[];
  tokens: (number | null)[];
  finish: (string | null)[];
  count: number[];
  value: Num[];
  rollout: Set<number>;
  scorers: Scorer[];
  pieces: (string | number)[];
  children: number[][] = [];
  depth: number[] = [];
  kept: boolean[] = []; // a finished path goes through it
  onPath: boolean[] = []; // of the chosen end
  below: number[] = []; // steps under it
  tokensBelow: number[] = []; // tokens of those and its own
  tokensTo: number[] = []; // tokens of the path up to its end
  private lower: string[] = [];
  private readonly ids = new Map<number, number>([[0, 0]]); // a server's ids -> places

  constructor(raw: RawTree) {
    this.name = raw.name;
    this.prompt = raw.prompt;
    this.primary = raw.primary;
    this.chosen = raw.chosen;
    this.facts = raw.facts;
    this.usage = raw.usage;
    this.notes = raw.notes;
    // The prompt gets place 0 in every column.
    this.parent = [-1, ...raw.parent];
    this.text = ["", ...raw.text];
    this.tokens = [0, ...raw.tokens];
    this.finish = [null, ...raw.finish];
    this.count = [1, ...raw.count];
    this.value = [null, ...raw.value];
    this.rollout = new Set(raw.rollout);
    this.pieces = raw.pieces;
    this.scorers = raw.scorers.map((scorer) => ({
      name: scorer.name,
      reward: [null, ...scorer.reward],
      q: [0, ...scorer.q],
      tokenRewards: [[], ...scorer.tokenRewards],
      pieces: [[], ...scorer.pieces],
    }));
    this.derive();
  }

  static empty(prompt: Message[]): Tree {
    const tree = new Tree({
      name: "Search", prompt, primary: "", chosen: null, facts: [], usage: {}, notes: [], parent: [], text: [],
      tokens: [], finish: [], count: [], value: [], rollout: [], scorers: [], pieces: [],
    });
    tree.running = true;
    return tree;
  }

  get size(): number {
    return this.parent.length;
  }

  get promptText(): string {
    return this.prompt.map((message) => message.text).join("\n");
  }

  isFinished(step: number): boolean {
    const how = this.finish[step];
    return how === "stop" || how === "length" || how === "budget";
  }

  path(step: number): number[] {
    const steps: number[] = [];
    for (let at = step; at > 0; at = this.parent[at]) steps.push(at);
    return steps.reverse();
  }

  pathText(step: number): string {
    return this.path(step).map((at) => this.text[at]).join("");
  }

  /** Steps whose text holds the words, whatever their case. */
  matches(words: string): number[] {
    const wanted = words.toLowerCase();
    const steps: number[] = [];
    for (let at = this.lower.length; at < this.size; at++) this.lower.push(this.text[at].toLowerCase());
    for (let at = 1; at < this.size; at++) if (this.lower[at].includes(wanted)) steps.push(at);
    return steps;
  }

  /** Take in steps that a server tells; one that came before has changed. */
  grow(steps: ToldStep[]): void {
    for (const told of steps) {
      let at = this.ids.get(told.id);
      if (at === undefined) {
        at = this.size;
        this.ids.set(told.id, at);
        this.parent.push(this.ids.get(told.parent) ?? 0);
        for (const column of [this.text, this.tokens, this.finish, this.count, this.value] as unknown[][]) column.push(null);
        for (const scorer of this.scorers) this.blank(scorer, at);
      }
      this.text[at] = told.text;
      this.lower.length = Math.min(this.lower.length, at);
      this.tokens[at] = told.tokens;
      this.finish[at] = told.finish;
      this.count[at] = told.count;
      this.value[at] = told.value;
      if (told.rollout) this.rollout.add(at);
      else this.rollout.delete(at);
      this.score(at, told);
    }
    this.derive();
  }

  /** The place of a step by the server's id. */
  placeOf(id: number): number | undefined {
    return this.ids.get(id);
  }

  private score(at: number, told: ToldStep): void {
    for (const [place, [name, reward]] of Object.entries(told.rewards).entries()) {
      let scorer = this.scorers.find((known) => known.name === name);
      if (!scorer) {
        scorer = { name, reward: [], q: [], tokenRewards: [], pieces: [] };
        for (let step = 0; step < this.size; step++) this.blank(scorer, step);
        scorer.q[0] = 0;
        this.scorers.push(scorer);
        this.primary ||= name;
      }
      scorer.reward[at] = reward;
      scorer.q[at] = place === 0 ? told.q : null;
      if (place === 0 && told.token_rewards && told.pieces) {
        const first = this.pieces.length;
        this.pieces.push(...told.pieces);
        scorer.tokenRewards[at] = told.token_rewards;
        scorer.pieces[at] = told.pieces.map((_, token) => first + token);
      }
    }
  }

  private blank(scorer: Scorer, at: number): void {
    scorer.reward[at] = scorer.q[at] = null;
    scorer.tokenRewards[at] = [];
    scorer.pieces[at] = [];
  }

  /** What follows from the columns. */
  derive(): void {
    const size = this.size;
    this.children = Array.from({ length: size }, () => []);
    this.depth = new Array(size).fill(0);
    this.tokensTo = new Array(size).fill(0);
    for (let at = 1; at < size; at++) {
      const parent = this.parent[at];
      this.children[parent].push(at);
      this.depth[at] = this.depth[parent] + 1;
      this.tokensTo[at] = this.tokensTo[parent] + (this.tokens[at] ?? 0);
    }
    const ended = this.finish.some((_, at) => this.isFinished(at));
    this.kept = new Array(size).fill(!ended);
    this.below = new Array(size).fill(0);
    this.tokensBelow = this.tokens.map((tokens) => tokens ?? 0);
    this.kept[0] = true;
    for (let at = size - 1; at > 0; at--) {
      if (this.isFinished(at)) this.kept[at] = true;
      const parent = this.parent[at];
      if (this.kept[at]) this.kept[parent] = true;
      this.below[parent] += this.below[at] + 1;
      this.tokensBelow[parent] += this.tokensBelow[at];
    }
    if (this.running) this.keepFrontier();
    if (this.chosen === null && ended && !this.running) this.guess();
    this.onPath = new Array(size).fill(false);
    if (this.chosen !== null) for (let at = this.chosen; at > 0; at = this.parent[at]) this.onPath[at] = true;
    if (this.chosen !== null) this.onPath[0] = true;
  }

  /** While a search runs, an open end counts as kept unless the search has gone two steps beyond it. */
  private keepFrontier(): void {
    const deepest = this.depth.reduce((most, depth) => Math.max(most, depth), 0);
    for (let at = this.size - 1; at > 0; at--) {
      if (!this.children[at].length) this.kept[at] = this.isFinished(at) || this.depth[at] >= deepest - 1;
      else this.kept[at] = this.children[at].some((child) => this.kept[child]);
    }
  }

  private guess(): void {
    let best = -Infinity;
    for (const how of ["stop", "length", "budget"]) {
      for (let at = 1; at < this.size; at++) {
        const value = this.value[at];
        if (this.finish[at] === how && isNumber(value) && value > best) {
          best = value;
          this.chosen = at;
          this.guessed = true;
        }
      }
      if (this.chosen !== null) return;
    }
  }
}
