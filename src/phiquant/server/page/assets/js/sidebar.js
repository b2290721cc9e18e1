// The list of conversations, and the drawer that it is on small screens.

import { byId, h, icon, iconButton } from "./dom.js";
import { read, write } from "./prefs.js";

const NARROW = matchMedia("(max-width: 52rem)");
const DAY = 86_400_000;

/** Under which heading a time goes. */
export function period(time, now = Date.now()) {
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 7 * DAY) return "Last seven days";
  return "Earlier";
}

/** `actions`: open(id), rename(id, title), remove(id), exportOne(id). */
export class Sidebar {
  #actions;
  #menu = null;
  #listed = [];
  #current = null;
  #running = new Set();
  #looks = null; // what the list shows now

  constructor(actions) {
    this.#actions = actions;
    this.app = byId("app");
    this.element = byId("sidebar");
    this.opener = byId("open-sidebar");
    this.opener.addEventListener("click", () => this.open(true));
    byId("close-sidebar").addEventListener("click", () => this.open(false));
    byId("scrim").addEventListener("click", () => this.open(false));
    this.element.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !NARROW.matches) return;
      event.stopPropagation(); // it does not stop the answer, too
      this.open(false);
    });
    NARROW.addEventListener("change", () => this.#apply(NARROW.matches ? false : read("sidebar", true)));
    this.#apply(NARROW.matches ? false : read("sidebar", true));
  }

  get isOpen() {
    return this.app.classList.contains("with-sidebar");
  }

  open(open) {
    if (!NARROW.matches) write("sidebar", open);
    this.#apply(open);
    if (open) byId("close-sidebar").focus();
    else this.opener.focus();
  }

  /** On a small screen the drawer makes way for what was chosen in it. */
  makeWay() {
    if (NARROW.matches) this.#apply(false);
  }

  #apply(open) {
    this.app.classList.toggle("with-sidebar", open);
    this.opener.setAttribute("aria-expanded", String(open));
    byId("main").inert = open && NARROW.matches;
  }

  update(listed, current, running) {
    this.#listed = listed;
    this.#current = current;
    this.#running = running;
    const list = byId("conversations");
    if (list.querySelector("input")) return; // a title is being written
    const looks = JSON.stringify([listed.map(({ id, title, updated }) => [id, title, period(updated)]), current, [...running]]);
    if (looks === this.#looks) return;
    this.#looks = looks;
    const active = list.contains(document.activeElement) ? document.activeElement : null;
    const focused = active?.closest("li")?.dataset.id;
    const groups = new Map();
    for (const entry of listed) {
      const name = period(entry.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(this.#entry(entry));
    }
    list.replaceChildren(
      ...[...groups].map(([name, entries]) => h("section", {}, h("h2", {}, name), h("ul", {}, ...entries))),
      ...(listed.length ? [] : [h("p", { class: "hint" }, "Conversations will be listed here.")]),
    );
    if (focused) list.querySelector(`[data-id="${focused}"] .${active.classList[0]}`)?.focus({ preventScroll: true });
  }

  #entry(entry) {
    const current = entry.id === this.#current;
    const title = entry.title || "Untitled";
    return h(
      "li",
      { "data-id": entry.id, class: current ? "current" : null },
      h(
        "button",
        { class: "open", type: "button", "aria-current": current ? "page" : null, title, click: () => this.#actions.open(entry.id) },
        h("span", { class: "title" }, title),
        this.#running.has(entry.id) ? h("span", { class: "pulse", role: "img", "aria-label": "is being answered" }) : null,
      ),
      iconButton("more", `More about ${title}`, (event) => this.#toggleMenu(event.currentTarget, entry), {
        "aria-haspopup": "menu",
        "aria-expanded": "false",
      }),
    );
  }

  #toggleMenu(button, entry) {
    if (this.#menu) {
      this.#menu.close();
      return;
    }
    const item = (name, label, run, more = "") =>
      h("button", { class: `item ${more}`, type: "button", role: "menuitem", tabindex: "-1", click: () => { close(); run(); } }, icon(name), label);
    const menu = h(
      "div",
      { class: "menu", role: "menu", "aria-label": entry.title || "Untitled" },
      item("edit", "Rename", () => this.#rename(entry)),
      item("download", "Export", () => this.#actions.exportOne(entry.id)),
      item("trash", "Delete", () => this.#actions.remove(entry.id), "danger"),
    );
    const items = [...menu.children];
    const close = (back = true) => {
      menu.remove();
      this.#menu = null;
      document.removeEventListener("pointerdown", outside, true);
      button.setAttribute("aria-expanded", "false");
      if (back) button.focus({ preventScroll: true });
    };
    const outside = (event) => {
      if (!menu.contains(event.target) && !button.contains(event.target)) close(false);
    };
    menu.addEventListener("keydown", (event) => {
      const index = items.indexOf(document.activeElement);
      const to = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: items.length - 1 }[event.key];
      if (to !== undefined) {
        event.preventDefault();
        items.at(to % items.length).focus();
      } else if (event.key === "Escape" || event.key === "Tab") {
        event.stopPropagation();
        if (event.key === "Escape") event.preventDefault();
        close();
      }
    });
    document.addEventListener("pointerdown", outside, true);
    button.setAttribute("aria-expanded", "true");
    this.element.append(menu);
    const place = button.getBoundingClientRect();
    const height = menu.offsetHeight;
    const below = place.bottom + 4 + height < window.innerHeight;
    menu.style.top = `${below ? place.bottom + 4 : Math.max(4, place.top - height - 4)}px`;
    menu.style.left = `${Math.max(8, place.right - menu.offsetWidth)}px`;
    this.#menu = { close };
    items[0].focus();
  }

  #rename(entry) {
    const row = byId("conversations").querySelector(`[data-id="${entry.id}"]`);
    const input = h("input", { class: "rename", "aria-label": "Title", maxlength: "200" });
    input.value = entry.title;
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      const title = input.value.trim();
      input.remove();
      if (keep && title && title !== entry.title) this.#actions.rename(entry.id, title);
      this.#looks = null;
      this.update(this.#listed, this.#current, this.#running);
      byId("conversations").querySelector(`[data-id="${entry.id}"] .open`)?.focus({ preventScroll: true });
    };
    input.addEventListener("blur", () => finish(true));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault(); // or it presses the button that has the focus next
        finish(true);
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    row.replaceChildren(input);
    input.focus();
    input.select();
  }
}
