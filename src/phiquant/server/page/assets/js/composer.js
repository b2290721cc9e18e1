// The field that messages are written in, and the line below it.

import { byId, h } from "./dom.js";
import { fit } from "./thread.js";

/** `actions`: send(text), stop(), editLast(). */
export class Composer {
  #actions;
  #running = false;
  #ready = false;

  constructor(actions) {
    this.#actions = actions;
    this.area = byId("prompt");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.stopButton.addEventListener("click", () => {
      actions.stop();
      this.focus();
    });
    this.area.addEventListener("input", () => this.#changed());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    byId("composer").addEventListener("click", (event) => {
      if (event.target === event.currentTarget) this.focus();
    });
  }

  focus() {
    this.area.focus({ preventScroll: true });
  }

  update(running, ready) {
    this.#running = running;
    this.#ready = ready;
    this.sendButton.hidden = running;
    this.stopButton.hidden = !running;
    this.#changed();
  }

  /** How full the context is, in tokens; null where it is not known. */
  context(used, size) {
    const place = byId("context");
    if (used === null) {
      place.replaceChildren(size === null ? "" : `Context of ${size.toLocaleString("en")} tokens`);
      return;
    }
    const text = size === null ? `${used.toLocaleString("en")} tokens` : `${used.toLocaleString("en")} of ${size.toLocaleString("en")} tokens`;
    const parts = [h("span", {}, h("span", { class: "hidden" }, "Context used: "), text)];
    if (size !== null) {
      const share = Math.min(used / size, 1);
      const fill = h("span", { class: share > 0.9 ? "full" : null });
      fill.style.width = `${Math.max(share * 100, 2)}%`;
      parts.unshift(h("span", { class: "gauge", "aria-hidden": "true" }, fill));
    }
    place.replaceChildren(...parts);
  }

  #changed() {
    fit(this.area);
    this.sendButton.disabled = !this.#ready || !this.area.value.trim();
  }

  #send() {
    const text = this.area.value.trim();
    if (!text || this.#running || !this.#ready) return;
    // The button is about to disappear. On a touch screen the keyboard shall make way for the answer.
    if (document.activeElement === this.sendButton && !matchMedia("(pointer: coarse)").matches) this.focus();
    this.area.value = "";
    this.#changed();
    this.#actions.send(text);
  }

  #key(event) {
    if (event.isComposing) return;
    // On a touch screen there is a button; its keyboard has no shift that people would find.
    const sends = event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey;
    if (sends && !matchMedia("(pointer: coarse)").matches) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && !this.area.value && !event.shiftKey) {
      event.preventDefault();
      this.#actions.editLast();
    }
  }
}
