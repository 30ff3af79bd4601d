/** A request as a command for a shell, and as Python for the openai client. */

type Json = null | boolean | number | string | Json[] | { [name: string]: Json };
export type Fields = { [name: string]: Json };

const KEY = "PRM_SEARCH_API_KEY";

export function asCurl(url: string, body: Fields, withKey: boolean): string {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $${KEY}"` : "";
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -s ${url} -H 'Content-Type: application/json'${key} -d '${data}'`;
}

export function asPython(url: string, body: Fields, withKey: boolean): string {
  const { prm_guidance: guidance, ...rest } = body;
  const chat = "messages" in body;
  const given = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},`);
  const made = chat ? "chat.completions" : "completions";
  const text = chat ? "message.content" : "text";
  const key = withKey ? `os.environ["${KEY}"]` : '"none"';
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(url.replace(/\/v1\/.*$/, "/v1"))}, api_key=${key})`,
    `answer = client.${made}.create(`,
    ...given,
    `    extra_body={"prm_guidance": ${literal(guidance)}},`,
    ")",
    `print(answer.choices[0].${text})`,
    "print(answer.prm_search[0], answer.usage.prm_search)",
    "",
  ].join("\n");
}

/** A Python literal; JSON's texts are Python's too. */
function literal(value: Json): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, part]) => `${literal(name)}: ${literal(part)}`).join(", ")}}`;
  return JSON.stringify(value);
}
