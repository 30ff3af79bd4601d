/** Texts and numbers as people read them. */

// Control characters, half characters, and marks that turn the direction of the text around them: spelt out. Joiners stay.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]|\p{Cs}/gu;

/** Text with what cannot be seen spelt out; line feeds and tabs stay. */
export function visible(text: string): string {
  return text.replace(UNSEEN, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

/** A step's text on a few lines: the beginning, white space as single spaces. */
export function brief(text: string, most: number): string {
  const head = text.slice(0, most * 2 + 64);
  const line = visible(head).replace(/\s+/g, " ").trim();
  if (line.length > most) return line.slice(0, most - 1).trimEnd() + "…";
  return line || (text ? "(white space)" : "(end)");
}

/** A number as records have it: null is none, a text is one that is not finite. */
export type Num = number | string | null;

export function isNumber(value: Num | undefined): value is number {
  return typeof value === "number";
}

/** A number with its sign and three digits behind the point, or as many as it needs to be seen. */
export function signed(value: Num | undefined): string {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  const size = Math.abs(value);
  const digits = size !== 0 && (size < 0.0005 || size >= 1e6) ? size.toExponential(2) : size.toFixed(3);
  return (value < 0 ? "−" : "+") + digits;
}

export function integer(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : value.toLocaleString("en-US");
}

export function plural(count: number, noun: string): string {
  return `${integer(count)} ${noun}${count === 1 ? "" : "s"}`;
}
