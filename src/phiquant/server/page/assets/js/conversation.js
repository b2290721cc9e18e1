// A conversation: a tree of messages, of which one path is shown. No DOM, no network, no storage.
//
// {id, title, created, updated, system, leaf, messages: [{id, parent, role, content, created, ...}]}
// Times are milliseconds since 1970. Further fields of an answer: reasoning, model, state ("running", "done", "stopped",
// "failed"), finish, error, limit, stats {tokens, context, rate, about, first}.

const TITLE = 60; // characters

/** A name for something new; crypto.randomUUID is only there over TLS and on localhost. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system, leaf: null, messages: [] };
}

export function find(conversation, id) {
  return conversation.messages.find((message) => message.id === id) ?? null;
}

/** What is shown: from the first message to the leaf. */
export function path(conversation, leaf = conversation.leaf) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const found = [];
  for (let message = byId.get(leaf); message; message = byId.get(message.parent)) found.push(message);
  return found.reverse();
}

/** A message and its alternatives: all answers to the same question, or all versions of a question; oldest first. */
export function siblings(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent && other.role === message.role);
}

/** Add a message and show the path to it. */
export function add(conversation, parent, role, content, more = {}) {
  const message = { id: newId(), parent, role, content, created: Date.now(), ...more };
  conversation.messages.push(message);
  conversation.leaf = message.id;
  conversation.updated = message.created;
  if (role === "user" && !conversation.title) conversation.title = titleOf(content);
  return message;
}

/** Show the branch of a message, down to where it was continued last. */
export function show(conversation, message) {
  let leaf = message;
  for (;;) {
    const children = conversation.messages.filter((other) => other.parent === leaf.id);
    if (!children.length) break;
    leaf = children.at(-1);
  }
  conversation.leaf = leaf.id;
}

/** The first line of a first message, cut at a word. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/^[#>*\s]+/, "").replace(/\s+/g, " ");
  if (line.length <= TITLE) return line || "Untitled";
  const cut = line.slice(0, TITLE + 1);
  const space = cut.lastIndexOf(" ");
  return `${(space > TITLE / 2 ? cut.slice(0, space) : cut.slice(0, TITLE)).trimEnd()}…`;
}

/** An answer's thoughts and the answer: models that reason write the former between <think> and </think>. */
export function split(message) {
  const content = message.content.trimStart();
  const given = message.reasoning ?? "";
  if (!content.startsWith("<think>")) return { thoughts: given, answer: message.content, thinking: false };
  const end = content.indexOf("</think>");
  if (end < 0) return { thoughts: given + content.slice(7), answer: "", thinking: true };
  return { thoughts: given + content.slice(7, end), answer: content.slice(end + 8).trimStart(), thinking: false };
}

/** What the server is sent: the path to a message; earlier thoughts and answers that came to nothing are left out. */
export function request(conversation, leaf) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const message of path(conversation, leaf)) {
    const content = message.role === "assistant" ? split(message).answer : message.content;
    if (content) messages.push({ role: message.role, content });
  }
  return messages;
}
