// One answer in the making: from the request to the last chunk, kept as it grows.

import { ApiError, chat } from "./api.js";
import { request } from "./conversation.js";
import { parameters } from "./sampling.js";

const SAVE = 1000; // milliseconds
const LEAST = 4; // pieces from which a speed can be told

export class Generation {
  #abort = new AbortController();

  /** `message` is the empty answer; `changed` is called whenever there is more of it, `save` from time to time. */
  constructor(conversation, message, model, { changed, save }) {
    this.conversation = conversation;
    this.message = message;
    this.model = model;
    this.pieces = 0;
    this.begin = performance.now();
    this.first = null;
    this.error = null;
    this.changed = changed;
    this.save = save;
  }

  stop() {
    this.#abort.abort();
  }

  /** Tokens per second so far, if every piece is one; null before there is something to tell. */
  get pace() {
    const seconds = (performance.now() - this.first) / 1000;
    return this.first === null || this.pieces < LEAST || seconds < 0.5 ? null : (this.pieces - 1) / seconds;
  }

  async run() {
    const { message } = this;
    const sent = parameters();
    let usage = null;
    let timings = null;
    let last = 0;
    try {
      const messages = request(this.conversation, message.parent);
      for await (const chunk of chat({ model: this.model, messages, ...sent }, this.#abort.signal)) {
        usage = chunk.usage ?? usage;
        timings = chunk.timings ?? timings;
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        const thought = choice.delta?.reasoning_content ?? "";
        const text = choice.delta?.content ?? "";
        if (thought || text) {
          this.pieces += 1;
          last = performance.now();
          this.first ??= last;
          if (thought) message.reasoning = (message.reasoning ?? "") + thought;
          message.content += text;
          this.changed(this);
          this.#saveSometimes();
        }
        if (choice.finish_reason) message.finish = choice.finish_reason;
      }
      message.state = "done";
    } catch (error) {
      if (error.name === "AbortError") {
        message.state = "stopped";
      } else {
        message.state = "failed";
        message.error = error instanceof ApiError ? error.message : `The page failed: ${error.message}.`;
        this.error = error;
      }
    }
    message.stats = this.#stats(usage, timings, last);
    message.limit = sent.max_tokens ?? null;
    this.conversation.updated = Date.now();
    return this;
  }

  #stats(usage, timings, last) {
    const stats = { first: this.first === null ? null : (this.first - this.begin) / 1000 };
    if (usage) {
      stats.tokens = usage.completion_tokens;
      stats.context = usage.total_tokens ?? usage.prompt_tokens + usage.completion_tokens;
    } else if (timings) {
      stats.tokens = timings.predicted_n;
    }
    const seconds = (last - this.first) / 1000;
    if (timings?.predicted_per_second > 0) stats.rate = timings.predicted_per_second;
    else if (stats.tokens > 1 && this.pieces > 1 && seconds > 0) stats.rate = (stats.tokens - 1) / seconds;
    else if (this.pieces >= LEAST && seconds > 0) Object.assign(stats, { rate: (this.pieces - 1) / seconds, about: true });
    return stats;
  }

  #saveSometimes() {
    const now = performance.now();
    if (now - (this.saved ?? this.begin) < SAVE) return;
    this.saved = now;
    this.save(this.conversation);
  }
}
