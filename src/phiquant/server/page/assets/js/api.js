// What the page asks of the server, and what its refusals mean.

import { read, write } from "./prefs.js";

/** A refusal or failure in one sentence. `status` is HTTP's; 0: there was no answer. */
export class ApiError extends Error {
  constructor(message, status = 0, more = {}) {
    super(message);
    this.status = status;
    this.code = more.code ?? null;
    this.retryAfter = more.retryAfter ?? null;
  }
}

let tabKey = "";

/** The key that is sent, remembered until the page is left or, if `keep`, in this browser. */
export const key = {
  get: () => tabKey || read("key", ""),
  kept: () => read("key") !== null,
  set(value, keep) {
    tabKey = keep ? "" : value;
    write("key", keep && value ? value : null);
  },
};

async function ask(path, { body, signal, given } = {}) {
  const headers = {};
  const secret = given ?? key.get();
  if (secret) headers.Authorization = `Bearer ${secret}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is phiquant serve still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = "";
  let code = null;
  try {
    const body = await response.json();
    const error = body.error ?? body;
    said = typeof error === "string" ? error : (error.message ?? body.detail ?? "");
    code = error.code ?? null;
  } catch {
    // Not JSON: a proxy's page. The status has to do.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(sentence(response.status, String(said), code, retryAfter), response.status, { code, retryAfter });
}

function sentence(status, said, code, retryAfter) {
  const reason = said && said[0].toUpperCase() + said.slice(1);
  const end = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
  if (status === 429) {
    const wait = retryAfter ? ` in ${retryAfter} s` : " in a moment";
    return end(reason || "The server has too much to do") + ` Try again${wait}.`;
  }
  if (code === "context_length_exceeded") {
    return `${end(reason)} A new conversation has room again.`;
  }
  if (status === 503) return end(reason || "The server is not ready yet");
  return reason ? end(reason) : `The server answered with status ${status}.`;
}

/** Names of the models: [{id, ...}]. */
export async function models(options) {
  const body = await (await ask("v1/models", options)).json();
  return Array.isArray(body.data) ? body.data.filter((model) => typeof model?.id === "string") : [];
}

/** What the server says of a model: its context size and its samplers' defaults; {} where it does not tell. */
export async function props(model) {
  try {
    return await (await ask(`props?model=${encodeURIComponent(model)}`)).json();
  } catch (error) {
    if (error.status === 401 || error.status === 0) throw error;
    return {};
  }
}

/** The chunks of a streamed answer. Error if the stream ends before the answer does. */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const said = typeof chunk.error === "string" ? chunk.error : chunk.error.message;
        throw new ApiError(sentence(500, String(said ?? ""), chunk.error.code ?? null, null), 500);
      }
      if (chunk.choices?.[0]?.finish_reason) finished = true;
      yield chunk;
    }
    if (finished) return;
  } catch (error) {
    if (signal?.aborted) throw new DOMException("stopped", "AbortError");
    if (error instanceof ApiError) throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent something that is not JSON.");
  }
  throw new ApiError("The connection broke before the answer was complete.");
}

/** Data of server-sent events, whatever pieces the bytes arrive in. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A lone \r at the end may be the first half of \r\n.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
