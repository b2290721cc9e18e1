// A streamed answer for screen readers: whole sentences, a few at a time, instead of every token.

import { byId, h } from "./dom.js";

const PAUSE = 1500; // milliseconds between announcements
const KEPT = 20; // paragraphs; what was said is of no further use

export function announce(text) {
  const place = byId("announcer");
  place.append(h("p", {}, text));
  while (place.childElementCount > KEPT) place.firstElementChild.remove();
}

const spoken = (markdown) =>
  markdown
    .replace(/```(\w*)[^\n]*/g, (_, language) => (language ? `Code, ${language}:` : ""))
    .replace(/!?\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/[*_`#>|~]+/g, " ")
    .replace(/[ \t]+/g, " ")
    .trim();

/** Says an answer while it grows. */
export class Speaker {
  #said = 0;
  #last = 0;

  update(text) {
    const now = performance.now();
    if (now - this.#last < PAUSE) return;
    const rest = text.slice(this.#said);
    const end = Math.max(...[". ", "! ", "? ", ".\n", ":\n", "\n"].map((mark) => rest.lastIndexOf(mark)));
    if (end < 0) return;
    this.#last = now;
    this.#say(rest.slice(0, end + 1));
    this.#said += end + 1;
  }

  end(text, how) {
    this.#say(text.slice(this.#said));
    this.#said = text.length;
    announce(how);
  }

  #say(text) {
    const words = spoken(text);
    if (words) announce(words);
  }
}
