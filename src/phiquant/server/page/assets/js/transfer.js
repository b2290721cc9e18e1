// Conversations as a JSON file: {"format": "phiquant-conversations", "version": 1, "conversations": [...]}.

import { h } from "./dom.js";

const FORMAT = "phiquant-conversations";
const VERSION = 1;
const MOST = 100 * 1024 * 1024; // bytes of a file

/** The text of a file that holds these. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 1);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A name for a file: a title's letters and digits. */
export function fileName(title) {
  const plain = title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  return `${plain || "conversation"}.json`;
}

export async function readFile(file) {
  if (file.size > MOST) throw new Error(`${file.name} has ${Math.round(file.size / 1024 / 1024)} MB; 100 are the most`);
  return imported(await file.text());
}

/** The conversations of a file's text, every field checked. Error in one sentence if it is something else. */
export function imported(text) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON");
  }
  if (body?.format !== FORMAT || !Array.isArray(body.conversations)) throw new Error("the file holds no conversations of phiquant");
  if (body.version !== VERSION) throw new Error(`the file has version ${body.version}; this page reads version ${VERSION}`);
  return body.conversations.map((conversation, index) => {
    try {
      return checked(conversation);
    } catch (error) {
      throw new Error(`conversation ${index + 1}: ${error.message}`);
    }
  });
}

const text = (value, name) => {
  if (typeof value !== "string") throw new Error(`${name} is no text`);
  return value;
};
const time = (value) => (Number.isFinite(value) && Math.abs(value) <= 8.64e15 ? value : Date.now());
const number = (value) => (Number.isFinite(value) ? value : null);
const identifier = (value) => {
  if (!/^[\w-]{1,64}$/.test(text(value, "an id"))) throw new Error(`${JSON.stringify(value.slice(0, 64))} is no id`);
  return value;
};

function checked(given) {
  if (!Array.isArray(given?.messages)) throw new Error("it has no messages");
  const seen = new Map();
  const messages = given.messages.map((message) => {
    const found = checkedMessage(message);
    if (seen.has(found.id)) throw new Error(`two messages have the id ${found.id}`);
    // Parents come before their children, so that there are no circles.
    if (found.parent !== null && !seen.has(found.parent)) throw new Error(`message ${found.id} follows one that is not there`);
    // Answers follow questions, and questions follow answers or nothing.
    const before = found.parent === null ? "assistant" : seen.get(found.parent);
    if (before === found.role) throw new Error(`message ${found.id} does not follow one of the other side`);
    seen.set(found.id, found.role);
    return found;
  });
  const leaf = seen.has(given.leaf) ? given.leaf : (messages.at(-1)?.id ?? null);
  return {
    id: identifier(given.id),
    title: text(given.title, "the title").slice(0, 200),
    created: time(given.created),
    updated: time(given.updated),
    system: text(given.system ?? "", "the system prompt"),
    leaf,
    messages,
  };
}

function checkedMessage(given) {
  if (given?.role !== "user" && given?.role !== "assistant") throw new Error("a message is of neither user nor assistant");
  const found = {
    id: identifier(given.id),
    parent: given.parent === null ? null : identifier(given.parent),
    role: given.role,
    content: text(given.content, "a message"),
    created: time(given.created),
  };
  if (given.role === "user") return found;
  const { stats } = given;
  return {
    ...found,
    model: typeof given.model === "string" ? given.model : "",
    state: ["done", "stopped", "failed"].includes(given.state) ? given.state : "interrupted",
    ...(typeof given.reasoning === "string" ? { reasoning: given.reasoning } : {}),
    ...(typeof given.finish === "string" ? { finish: given.finish } : {}),
    ...(typeof given.error === "string" ? { error: given.error } : {}),
    limit: number(given.limit),
    stats: { tokens: number(stats?.tokens), context: number(stats?.context), rate: number(stats?.rate), first: number(stats?.first), about: stats?.about === true },
  };
}
