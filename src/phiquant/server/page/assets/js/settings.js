// The sheet of settings: system prompt, sampling, conversations as files, the key.

import { key } from "./api.js";
import { byId, h } from "./dom.js";
import { read, write } from "./prefs.js";
import { FIELDS, choose, problem, reset, valueOf } from "./sampling.js";

export const defaultSystem = () => read("system", "");

/** `actions`: system(text), exportAll(), importFile(file), deleteAll(), changeKey(). */
export class Settings {
  #actions;
  #inputs = new Map();

  constructor(actions) {
    this.#actions = actions;
    this.dialog = byId("settings");
    this.system = byId("system");
    this.asDefault = byId("system-default");
    this.system.addEventListener("input", () => this.#keepSystem());
    this.asDefault.addEventListener("change", () => {
      write("system", this.asDefault.checked ? this.system.value : null);
    });
    byId("fields").append(...FIELDS.map((field) => this.#field(field)));
    byId("reset-settings").addEventListener("click", () => {
      reset();
      this.#showValues();
    });
    byId("export-all").addEventListener("click", () => actions.exportAll());
    byId("delete-all").addEventListener("click", () => actions.deleteAll());
    byId("change-key").addEventListener("click", () => actions.changeKey());
    const file = byId("import-file");
    byId("import").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      if (file.files.length) actions.importFile(file.files[0]);
      file.value = "";
    });
  }

  open(conversation) {
    this.system.value = conversation.system;
    this.asDefault.checked = Boolean(conversation.system) && conversation.system === defaultSystem();
    this.#showValues();
    this.showKey();
    this.dialog.showModal();
  }

  showKey() {
    const where = key.kept() ? "remembered in this browser" : "until this page is left";
    byId("key-state").textContent = key.get() ? `One is used, ${where}.` : "None is used.";
  }

  #keepSystem() {
    this.#actions.system(this.system.value);
    if (this.asDefault.checked) write("system", this.system.value);
  }

  #field(field) {
    const { name, label, hint, min, max, step, blank } = field;
    const error = h("span", { class: "error-text", id: `${name}-error` });
    const input = h("input", {
      id: name, type: "number", inputmode: field.whole ? "numeric" : "decimal", min, max, step, placeholder: blank ?? null,
      "aria-describedby": `${name}-hint ${name}-error`, autocomplete: "off",
    });
    input.addEventListener("input", () => {
      // A number field that holds something else has no value, but says so.
      const value = input.validity.badInput ? Number.NaN : input.value === "" ? null : Number(input.value);
      const wrong = problem(field, value);
      error.textContent = wrong ?? "";
      if (wrong) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
      if (!wrong) choose(name, value);
    });
    this.#inputs.set(name, { input, error });
    return h(
      "div",
      { class: "field" },
      h("label", { for: name }, label),
      input,
      h("span", { class: "hint", id: `${name}-hint` }, hint),
      error,
    );
  }

  #showValues() {
    for (const [name, { input, error }] of this.#inputs) {
      input.value = valueOf(name) ?? "";
      input.removeAttribute("aria-invalid");
      error.textContent = "";
    }
  }
}
