// Formulas: TeX between $ or \( \), and between $$ or \[ \] on lines of their own, become MathML, which browsers set.

import { escapeHtml } from "./dom.js";

const BLOCK = /^(?:\$\$(?!\$)([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n+|$)/;
// A dollar before a digit or after a space is money.
const INLINE = /^(?:\$\$([^\n]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$(?![\s$])((?:\\.|[^\\$\n])*?)(?<!\s)\$(?![\d$]))/;
const MOST = 5000; // characters of one formula

let temml = null;
let loading = null;

/** Extensions of marked. They leave the TeX as text in an element that `typeset` fills. */
export const mathExtensions = [
  {
    name: "mathBlock",
    level: "block",
    start: (source) => source.match(/\n[ ]{0,3}(?:\$\$|\\\[)/)?.index,
    tokenizer(source) {
      const match = BLOCK.exec(source);
      return match ? { type: "mathBlock", raw: match[0], text: (match[1] ?? match[2]).trim() } : undefined;
    },
    renderer: ({ text, raw }) => `<div class="math" data-tex="${escapeHtml(text)}">${escapeHtml(raw.trim())}</div>`,
  },
  {
    name: "mathInline",
    level: "inline",
    start: (source) => source.match(/\$|\\[([]/)?.index,
    tokenizer(source) {
      const match = INLINE.exec(source);
      if (!match) return undefined;
      return { type: "mathInline", raw: match[0], text: (match[1] ?? match[2] ?? match[3] ?? match[4]).trim() };
    },
    renderer: ({ text, raw }) => `<span class="math" data-tex="${escapeHtml(text)}">${escapeHtml(raw)}</span>`,
  },
];

/** Set the formulas of a sanitised fragment; false if `load` has to come first. */
export function typeset(fragment) {
  const places = fragment.querySelectorAll(".math[data-tex]");
  if (places.length && temml === null) return false;
  for (const place of places) {
    const tex = place.dataset.tex;
    if (!tex || tex.length > MOST) continue;
    const source = place.textContent;
    try {
      place.replaceChildren();
      temml.render(tex, place, { displayMode: place.nodeName === "DIV", throwOnError: true, trust: false, maxExpand: 500 });
    } catch {
      place.textContent = source; // not TeX: it stays what the model wrote
    }
  }
  return true;
}

/** Fetch the typesetter; false if it cannot be had. */
export function load() {
  loading ??= new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = new URL("../vendor/temml/temml.min.js", import.meta.url).href;
    script.onload = () => {
      temml = globalThis.temml;
      resolve(true);
    };
    script.onerror = () => {
      loading = null;
      resolve(false);
    };
    document.head.append(script);
  });
  return loading;
}
