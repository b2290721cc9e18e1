// Elements, icons and other small change of the DOM.

/** An element. Attributes: functions listen to the event of their name; true is an empty one; false and null are none. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
export const escapeHtml = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

// Strokes on a grid of 24.
const ICONS = {
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  compose: "M12 5H7a2 2 0 0 0-2 2v10a2 2 0 0 0 2 2h10a2 2 0 0 0 2-2v-5M10 14l.6-2.6L18 4a1.4 1.4 0 0 1 2 2l-7.4 7.4z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  dark: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  down: "M12 5v14M6 13l6 6 6-6",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  edit: "M5 19l.8-3.6L16.5 4.7a1.6 1.6 0 0 1 2.3 0l.5.5a1.6 1.6 0 0 1 0 2.3L8.6 18.2z",
  keyboard: "M3 6.5h18v11H3zM7 10.5h.01M10.5 10.5h.01M14 10.5h.01M17.2 10.5h.01M8 14.2h8",
  left: "M14.5 6l-6 6 6 6",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M18.7 5.3l-1.4 1.4M6.7 17.3l-1.4 1.4",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  plus: "M12 5v14M5 12h14",
  redo: "M19 12a7 7 0 1 1-2.2-5.1L19.5 9M19.5 4.5V9H15",
  right: "M9.5 6l6 6-6 6",
  sidebar: "M4 5.5h16v13H4zM9.5 5.5v13",
  sliders: "M4 8h9M19 8h1M16 5.8a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4zM4 16h1M11 16h9M8 13.8a2.2 2.2 0 1 0 0 4.4 2.2 2.2 0 0 0 0-4.4z",
  stop: "M8 8h8v8H8z",
  system: "M3.5 5h17v11h-17zM9 20h6M12 16v4",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.2 10.5v5.5M13.8 10.5v5.5",
  up: "M12 19V5M6 11l6-6 6 6",
  upload: "M12 16V5M7 9l5-5 5 5M5 20h14",
};
const SVG = "http://www.w3.org/2000/svg";

/** A drawing that screen readers pass over; the button around it has the name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Put icons where the document names them. */
export function fillIcons(root = document) {
  for (const place of root.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));
}

export function iconButton(name, label, click, attributes = {}) {
  return h("button", { class: "icon-button", type: "button", "aria-label": label, title: label, click, ...attributes }, icon(name));
}

/** Copy text; also where the page was not fetched over TLS and the browser withholds its clipboard. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = h("textarea", { class: "hidden", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  const focused = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  if (!done) throw new Error("the browser did not let the page copy");
}

/** Copy, and let the button say for a moment that it did. */
export async function copyFrom(button, text) {
  const label = button.getAttribute("aria-label");
  try {
    await copyText(text);
  } catch (error) {
    toast(`Not copied: ${error.message}`);
    return;
  }
  button.querySelector("svg").replaceWith(icon("check"));
  button.setAttribute("aria-label", "Copied");
  setTimeout(() => {
    button.querySelector("svg")?.replaceWith(icon("copy"));
    button.setAttribute("aria-label", label);
  }, 1500);
}

/** A sentence at the edge of the page, with something to do about it if `action` names that. */
export function toast(text, action = null, run = null) {
  const place = byId("toasts");
  const button = action && h("button", { class: "text-button", type: "button", click: () => { run(); box.remove(); } }, action);
  const box = h("div", { class: "toast" }, h("span", {}, text), button);
  place.replaceChildren(box);
  const leave = () => {
    if (box.matches(":hover, :focus-within")) setTimeout(leave, 2000);
    else box.remove();
  };
  setTimeout(leave, action ? 9000 : 5000);
}
