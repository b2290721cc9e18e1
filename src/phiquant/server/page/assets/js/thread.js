// The messages of the shown path.

import { path, siblings, split } from "./conversation.js";
import { byId, copyFrom, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NEAR = 60; // pixels from the end within which the view follows what is written

/** Shows a conversation. `actions`: edit(message, text), again(message), show(message). */
export class Thread {
  #actions;
  #views = new Map();
  #shown = null; // a conversation's id
  #follows = true;

  constructor(actions) {
    this.#actions = actions;
    this.list = byId("thread");
    this.scroll = byId("scroll");
    this.toEnd = byId("to-end");
    this.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.toEnd.addEventListener("click", () => {
      this.follow();
      this.scroll.focus({ preventScroll: true });
    });
    this.list.addEventListener("click", (event) => {
      const button = event.target.closest(".copy-code");
      if (button) copyFrom(button, button.closest(".code").querySelector("pre").textContent);
    });
    new ResizeObserver(() => this.settle()).observe(this.list);
    new ResizeObserver(() => this.settle()).observe(this.scroll);
  }

  /** Bring the page up to date with a conversation; messages that stay keep their elements. */
  render(conversation) {
    if (conversation.id !== this.#shown) {
      this.#views.clear();
      this.#shown = conversation.id;
      this.#follows = true;
    }
    const shown = path(conversation);
    const views = shown.map((message) => {
      const view = this.#views.get(message.id) ?? this.#create(message);
      this.#views.set(message.id, view);
      view.update(message, siblings(conversation, message));
      return view;
    });
    const kept = new Set(shown.map(({ id }) => id));
    for (const id of this.#views.keys()) if (!kept.has(id)) this.#views.delete(id);
    const elements = views.map(({ element }) => element);
    // Moving an element would take the focus from it; only what differs is touched.
    elements.forEach((element, index) => {
      const there = this.list.children[index];
      if (there === element) return;
      if (there && !elements.includes(there)) there.replaceWith(element);
      else this.list.insertBefore(element, there ?? null);
    });
    while (this.list.childElementCount > elements.length) this.list.lastElementChild.remove();
    this.settle();
  }

  #create(message) {
    return message.role === "user" ? new Question(message, this.#actions) : new Answer(message, this.#actions);
  }

  /** Show how far an answer has come. */
  progress(message, generation) {
    this.#views.get(message.id)?.progress(message, generation);
  }

  view(message) {
    return this.#views.get(message.id);
  }

  /** Go to the end and stay there. */
  follow() {
    this.#follows = true;
    this.settle();
  }

  settle() {
    if (this.#follows) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.#offer();
  }

  #scrolled() {
    this.#follows = this.#distance() < NEAR;
    this.#offer();
  }

  #distance() {
    return this.scroll.scrollHeight - this.scroll.clientHeight - this.scroll.scrollTop;
  }

  #offer() {
    this.toEnd.hidden = this.#distance() < NEAR * 2;
  }
}

/** "‹ 2 / 3 ›" between a message's alternatives. */
function branches(message, all, show, what) {
  if (all.length < 2) return null;
  const index = all.findIndex(({ id }) => id === message.id);
  const go = (step, name, label) => {
    const other = all[index + step];
    const button = iconButton(name, label, () => show(other));
    if (!other) button.disabled = true;
    return button;
  };
  return h(
    "span",
    { class: "branches", role: "group", "aria-label": `${what} ${index + 1} of ${all.length}` },
    go(-1, "left", `Previous ${what.toLowerCase()}`),
    h("span", { "aria-hidden": "true" }, `${index + 1} / ${all.length}`),
    go(1, "right", `Next ${what.toLowerCase()}`),
  );
}

class Question {
  #actions;
  #message;
  #editing = false;

  constructor(message, actions) {
    this.#actions = actions;
    this.#message = message;
    this.body = h("div", { class: "bubble" });
    this.foot = h("div", { class: "foot" });
    this.element = h("article", { class: "message question", tabindex: "-1" }, h("h2", { class: "hidden" }, "You"), this.body, this.foot);
  }

  update(message, all) {
    this.#message = message;
    if (this.#editing) return;
    if (this.body.textContent !== message.content) this.body.textContent = message.content;
    this.copy = iconButton("copy", "Copy message", () => copyFrom(this.copy, message.content));
    this.foot.replaceChildren(
      ...[
        this.copy,
        iconButton("edit", "Edit message", () => this.edit()),
        branches(message, all, this.#actions.show, "Version"),
      ].filter(Boolean),
    );
  }

  edit() {
    if (this.#editing) return;
    this.#editing = true;
    const area = h("textarea", { "aria-label": "Edited message", rows: "2" });
    area.value = this.#message.content;
    const close = () => {
      this.#editing = false;
      form.replaceWith(this.body);
      this.foot.hidden = false;
      this.foot.querySelector('[aria-label="Edit message"]')?.focus({ preventScroll: true });
    };
    const send = () => {
      const text = area.value.trim();
      if (!text) return;
      close();
      if (text !== this.#message.content) this.#actions.edit(this.#message, text);
    };
    const form = h(
      "form",
      {
        class: "edit",
        submit: (event) => {
          event.preventDefault();
          send();
        },
        keydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            close();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
            event.preventDefault();
            send();
          }
        },
      },
      area,
      h(
        "div",
        { class: "row end" },
        h("button", { class: "button", type: "button", click: close }, "Cancel"),
        h("button", { class: "button primary", type: "submit" }, "Send"),
      ),
    );
    this.body.replaceWith(form);
    this.foot.hidden = true;
    fit(area);
    area.addEventListener("input", () => fit(area));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

/** Make a text field as high as its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

class Answer {
  #actions;
  #markdown;
  #shown = null; // the text and state that the page has
  #due = 0; // a frame has been asked for
  #cost = 0; // milliseconds that showing it took

  constructor(message, actions) {
    this.#actions = actions;
    this.text = h("div", { class: "prose" });
    this.#markdown = new MarkdownView(this.text);
    this.thoughts = h("div", { class: "thoughts-text" });
    this.thinking = h("details", { class: "thoughts", hidden: true }, h("summary", {}, h("span", {}, "Thoughts")), this.thoughts);
    this.wait = h("div", { class: "wait", role: "img", "aria-label": "The model is reading", hidden: true }, h("i"), h("i"), h("i"));
    this.error = h("div", { class: "failure", role: "alert", hidden: true });
    this.foot = h("div", { class: "foot" });
    this.element = h(
      "article",
      { class: "message answer", tabindex: "-1" },
      h("h2", { class: "hidden" }, message.model || "Answer"),
      this.thinking,
      this.text,
      this.wait,
      this.error,
      this.foot,
    );
  }

  update(message, all) {
    this.#show(message);
    const running = message.state === "running";
    this.copy = iconButton("copy", "Copy answer", () => copyFrom(this.copy, split(message).answer));
    this.stats = h("span", { class: "stats" }, ...(running ? [] : described(message)));
    this.foot.replaceChildren(
      ...[
        !running && message.content ? this.copy : null,
        running ? null : iconButton("redo", "Regenerate", () => this.#actions.again(message)),
        running ? null : branches(message, all, this.#actions.show, "Answer"),
        this.stats,
      ].filter(Boolean),
    );
  }

  /** More text: shown with the next frame, and not so often that showing takes more than a quarter of the time. */
  progress(message, generation) {
    if (this.#due) return;
    this.#due = 1;
    setTimeout(
      () =>
        requestAnimationFrame(() => {
          this.#due = 0;
          if (message.state !== "running") return;
          this.#show(message);
          const pace = generation.pace;
          if (pace !== null) this.stats.textContent = `≈ ${pace.toFixed(1)} tokens/s`;
        }),
      Math.min(this.#cost * 3, 1000),
    );
  }

  #show(message) {
    const state = `${message.state}:${message.content.length}:${message.reasoning?.length ?? 0}`;
    if (state === this.#shown) return;
    this.#shown = state;
    const begin = performance.now();
    const running = message.state === "running";
    const { thoughts, answer, thinking } = split(message);
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    this.#markdown.update(answer, !running);
    const over = thoughts.trim();
    this.thinking.hidden = !over;
    this.thinking.classList.toggle("active", running && (thinking || !answer));
    if (this.thoughts.textContent !== over) this.thoughts.textContent = over;
    this.wait.hidden = !running || Boolean(answer) || Boolean(over);
    this.error.hidden = message.state !== "failed";
    this.error.replaceChildren(...(message.state === "failed" ? this.#failure(message) : []));
    this.#cost = performance.now() - begin;
  }

  #failure(message) {
    return [
      h("span", {}, message.error ?? "The answer failed."),
      h("button", { class: "button", type: "button", click: () => this.#actions.again(message) }, icon("redo"), "Try again"),
    ];
  }
}

/** What there is to say below an answer: how it ended, and how fast it came. */
function described(message) {
  const { stats = {}, state, finish } = message;
  const parts = [];
  if (state === "stopped") parts.push("stopped");
  if (state === "interrupted") parts.push("interrupted");
  if (finish === "length") {
    parts.push(message.limit && stats.tokens >= message.limit ? `cut off at ${message.limit} tokens` : "cut off: the context is full");
  }
  if (stats.tokens) parts.push(`${stats.tokens.toLocaleString("en")} token${stats.tokens === 1 ? "" : "s"}`);
  if (stats.rate) parts.push(`${stats.about ? "≈ " : ""}${stats.rate.toFixed(1)} tokens/s`);
  if (stats.first >= 0.05) parts.push(`first after ${stats.first < 10 ? stats.first.toFixed(1) : Math.round(stats.first)} s`);
  return parts.flatMap((part, index) => [index ? h("span", { class: "dot", "aria-hidden": "true" }, "·") : null, h("span", {}, part)]).filter(Boolean);
}
