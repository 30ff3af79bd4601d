/** A search over the server's own routes: one request, and its server-sent events. */

import type { ToldStep } from "./data";
import type { Num } from "./text";

export interface Told {
  prompt?: number;
  steps?: ToldStep[];
  usage?: Record<string, Record<string, number>>;
  stopped?: string;
  value?: Num;
  answer?: string | null;
  path?: number[];
}

export interface Refusal {
  status: number;
  message: string;
  param: string | null;
}

interface Chunk {
  prm_search?: Told[];
  error?: { message: string; param: string | null };
}

export class Refused extends Error {
  constructor(readonly refusal: Refusal) {
    super(refusal.message);
  }
}

export function headers(key: string): Record<string, string> {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** An address of the API beside this page. */
export function address(path: string): string {
  return new URL(`v1/${path}`, location.href).href;
}

/** Raises Refused where the server says no. */
export async function checked(response: Response): Promise<Response> {
  if (response.ok) return response;
  const text = await response.text();
  let error = { message: text || response.statusText, param: null as string | null };
  try {
    error = { ...error, ...(JSON.parse(text) as { error: typeof error }).error };
  } catch {
    // not of the API: a proxy's page, say
  }
  throw new Refused({ status: response.status, message: error.message, param: error.param });
}

/** Ask, and hand over what the server tells, until it has ended or the signal aborts. */
export async function search(
  path: string, body: unknown, key: string, signal: AbortSignal, tell: (told: Told) => void,
): Promise<void> {
  const response = await checked(
    await fetch(address(path), { method: "POST", headers: headers(key), body: JSON.stringify(body), signal }),
  );
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop()!;
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data) as Chunk;
      if (chunk.error) throw new Refused({ status: 200, message: chunk.error.message, param: chunk.error.param });
      for (const told of chunk.prm_search ?? []) tell(told);
    }
  }
  throw new Error("the server closed the connection before the search had ended");
}
