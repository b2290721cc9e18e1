// Dialogs: opening and closing, the question before something is lost, the key, the list of shortcuts.

import { key, models } from "./api.js";
import { byId, h } from "./dom.js";

/** Let all dialogs close by their buttons and by a click beside them. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog && outside(dialog, event)) dialog.close();
      else if (event.target.closest("[data-close]")) dialog.close();
    });
  }
}

function outside(dialog, { clientX, clientY }) {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  return clientX < left || clientX > right || clientY < top || clientY > bottom;
}

/** Ask before something cannot be undone; true if it shall be done. */
export function confirmed(title, text, yes) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  const button = byId("confirm-yes");
  button.textContent = yes;
  return new Promise((resolve) => {
    let done = false;
    button.onclick = () => {
      done = true;
      dialog.close();
    };
    dialog.addEventListener("close", () => resolve(done), { once: true });
    dialog.showModal();
  });
}

let asking = null;

/** Ask for the server's key until one is right; false if it was not given. */
export function askForKey(refused = false) {
  asking ??= ask(refused).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(refused) {
  const dialog = byId("key");
  const input = byId("key-input");
  const problem = byId("key-error");
  input.value = "";
  byId("key-keep").checked = key.kept();
  problem.textContent = refused ? "The key that was used is not one of them." : "";
  return new Promise((resolve) => {
    let given = false;
    byId("key-form").onsubmit = async (event) => {
      event.preventDefault();
      const value = input.value.trim();
      problem.textContent = "";
      // A header has bytes; fetch refuses others with a message that helps nobody.
      if (!value || /[^\x21-\x7e]/.test(value)) {
        problem.textContent = value ? "A key has letters, digits and signs of ASCII only." : "A key is needed.";
      } else {
        try {
          await models({ given: value });
          key.set(value, byId("key-keep").checked);
          given = true;
          dialog.close();
          return;
        } catch (error) {
          problem.textContent = error.status === 401 ? "The server does not know this key." : error.message;
        }
      }
      input.setAttribute("aria-invalid", "true");
      input.focus();
    };
    dialog.addEventListener("close", () => {
      input.value = "";
      input.removeAttribute("aria-invalid");
      resolve(given);
    }, { once: true });
    dialog.showModal();
    input.focus();
  });
}

/** Shortcuts: [keys, what they do]. */
export function listShortcuts(shortcuts) {
  byId("keys-list").replaceChildren(
    ...shortcuts.map(([keys, what]) => h("div", {}, h("dt", {}, what), h("dd", {}, ...keys.map((name) => h("kbd", {}, name))))),
  );
}
