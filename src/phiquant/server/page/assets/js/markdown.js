// Markdown that arrives bit by bit, as a sanitised piece of the document.
//
// A model's text is somebody else's: HTML in it is shown as the text it is, but for a few harmless tags; images become
// links, so that nothing is fetched from anywhere; and everything passes DOMPurify before it enters the document.

import DOMPurify from "../vendor/dompurify/purify.es.js";
import { Marked } from "../vendor/marked/marked.esm.js";
import { escapeHtml, h, icon } from "./dom.js";
import { highlighted, isLoaded, languageOf, load as loadLanguage } from "./highlight.js";
import { load as loadMath, mathExtensions, typeset } from "./math.js";
import { morph } from "./morph.js";

const PLAIN_TAGS = /<\/?(?:br|sub|sup|kbd|mark|b|i|u|s|em|strong|del|ins|small)\s*\/?>/gi;
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "div", "em", "h3", "h4", "h5", "h6", "hr", "i", "input", "ins", "kbd",
    "li", "mark", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead",
    "tr", "u", "ul",
  ],
  ALLOWED_ATTR: [
    "align", "checked", "class", "data-language", "data-tex", "disabled", "href", "start", "title", "type",
  ],
  ALLOW_DATA_ATTR: false,
  // DOMPurify holds this against the values of all attributes, so what has no scheme must pass; links have a rule below.
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|[^a-z]|[a-z+.-]+(?:[^a-z+.:-]|$))/i,
  RETURN_DOM_FRAGMENT: true,
};
const SPANS = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };

/** HTML as it was written, as text, but for tags that only format and have no attributes. */
function shown(html) {
  let out = "";
  let end = 0;
  for (const match of html.matchAll(PLAIN_TAGS)) {
    out += escapeHtml(html.slice(end, match.index)) + match[0];
    end = match.index + match[0].length;
  }
  return out + escapeHtml(html.slice(end));
}

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    html({ text, block }) {
      return block ? `<p class="as-written">${shown(text.trimEnd())}</p>` : shown(text);
    },
    image({ href, text }) {
      return `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`;
    },
    heading({ tokens, depth }) {
      // The page has h1 and h2 of its own.
      const tag = `h${Math.min(depth + 2, 6)}`;
      return `<${tag} class="level-${depth}">${this.parser.parseInline(tokens)}</${tag}>\n`;
    },
    code({ text, lang }) {
      const word = (lang ?? "").trim().split(/[\s{,]/, 1)[0];
      return `<pre data-language="${escapeHtml(word)}"><code>${escapeHtml(text)}</code></pre>`;
    },
  },
  extensions: mathExtensions,
});

/** A token's elements, and what has to be fetched before they look as they should. */
function rendered(token) {
  const fragment = DOMPurify.sanitize(marked.parser([token]), ALLOWED);
  const missing = [];
  for (const link of fragment.querySelectorAll("a[href]")) {
    if (!/^(?:https?:|mailto:)/i.test(link.getAttribute("href"))) {
      link.removeAttribute("href");
      continue;
    }
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  for (const input of fragment.querySelectorAll("input")) {
    if (input.type === "checkbox") input.setAttribute("aria-label", input.checked ? "Done" : "To do");
    else input.remove();
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const language = languageOf(pre.dataset.language ?? "");
    if (language !== null && !isLoaded(language)) missing.push(() => loadLanguage(language));
    decorate(pre, language);
  }
  if (!typeset(fragment)) missing.push(loadMath);
  const elements = [];
  for (const child of [...fragment.childNodes]) {
    if (child.nodeType === Node.ELEMENT_NODE) elements.push(child);
    else if (child.textContent.trim()) elements.push(h("p", {}, child));
  }
  return { token, elements, missing };
}

/** Put a head with language and copy button over code, and colours into it. */
function decorate(pre, language) {
  const word = pre.dataset.language ?? "";
  const code = pre.firstElementChild ?? pre;
  const html = highlighted(code.textContent, language);
  if (html !== null) code.replaceChildren(DOMPurify.sanitize(html, SPANS));
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", word ? `Code: ${word}` : "Code");
  const copy = h("button", { class: "icon-button copy-code", type: "button", "aria-label": "Copy code" }, icon("copy"));
  const box = h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, word || "text"), copy));
  pre.replaceWith(box);
  box.append(pre);
}

const LONGEST_FORMULA = 1000; // characters; what is open for longer is no formula

// What the last line may turn into when more of it comes; until then it is not shown.
const UNDECIDED = /(?:^|\n)[ \t]*(?:[-=*+#>_]+|\d+[.)]?|`{1,3}|\|[^\n]*(?:\n\|[ \t:|-]*)?|\\\[?|\$\$?)[ \t]*$/;

/** Formulas are shown when they are complete. */
function withoutOpenFormula(text) {
  for (const [open, close] of [["\\[", "\\]"], ["\\(", "\\)"]]) {
    const begin = text.lastIndexOf(open);
    if (begin >= 0 && text.length - begin < LONGEST_FORMULA && text.indexOf(close, begin) < 0) return text.slice(0, begin);
  }
  const dollars = text.lastIndexOf("$$");
  const open = dollars >= 0 && text.split("$$").length % 2 === 0;
  return open && text.length - dollars < LONGEST_FORMULA ? text.slice(0, dollars) : text;
}

/** The end of an unfinished text, so that what is being written does not look like something else for a moment. */
function mended(raw, type) {
  if (type === "code" || type === "html" || type === "table" || type === "mathBlock") return raw;
  let text = withoutOpenFormula(raw.replace(UNDECIDED, ""));
  text = text.replace(/!?\[([^\]\n]*)(?:\]\([^)\n]*|\]|)$/, (whole, label) => (whole.endsWith("]") ? whole : label));
  const line = text.slice(text.lastIndexOf("\n") + 1);
  if ((line.split("`").length - 1) % 2 === 1) return line.endsWith("`") ? text.slice(0, -1) : `${text}\``;
  const prose = line.replace(/`[^`]*`/g, "");
  if ((prose.split("**").length - 1) % 2 === 1) {
    const inner = text.replace(/\*+$/, "");
    return prose.replace(/\*+$/, "").split("**").length % 2 === 1 ? inner : `${inner.trimEnd()}**`;
  }
  return text;
}

/** The tokens of an unfinished text, the last of them mended. */
function settled(tail) {
  const tokens = marked.lexer(tail);
  const last = tokens.at(-1);
  if (!last || last.type === "space") return tokens;
  const better = mended(last.raw, last.type);
  return better === last.raw ? tokens : [...tokens.slice(0, -1), ...marked.lexer(better)];
}

/** Rendered Markdown in `container`. Blocks that are complete are not touched again while the text grows. */
export class MarkdownView {
  #container;
  #text = "";
  #final = false;
  #offset = 0; // where the blocks that are complete end in #text
  #complete = 0; // how many elements they have made

  constructor(container) {
    this.#container = container;
  }

  /** Show a text; `final` if no more of it comes. */
  update(source, final) {
    const text = source.replace(/\r\n?/g, "\n");
    // At the end all is read again: a link may have been defined below its use.
    if (final || !text.startsWith(this.#text.slice(0, this.#offset))) this.#offset = this.#complete = 0;
    this.#text = text;
    this.#final = final;
    const tail = text.slice(this.#offset);
    const tokens = final ? marked.lexer(tail) : settled(tail);
    const blocks = tokens.filter(({ type }) => type !== "space").map(rendered);
    this.#show(blocks.flatMap(({ elements }) => elements));
    if (!final) this.#advance(tail, tokens, blocks);
    for (const fetched of new Set(blocks.flatMap(({ missing }) => missing))) this.#afterwards(fetched());
  }

  /** Make the elements from the first incomplete one on equal to these. */
  #show(wanted) {
    const live = [...this.#container.children].slice(this.#complete);
    wanted.forEach((element, index) => {
      const old = live[index];
      if (old === undefined) this.#container.append(element);
      else morph(old, element);
    });
    for (const old of live.slice(wanted.length)) old.remove();
  }

  /** All blocks but the last are complete: nothing that follows changes them, but links that are defined later. */
  #advance(tail, tokens, blocks) {
    if (blocks.length < 2) return;
    const before = tokens.slice(0, tokens.indexOf(blocks.at(-1).token));
    const raw = before.map((token) => token.raw).join("");
    if (!tail.startsWith(raw)) return; // the lexer has changed something; then all is read again the next time
    this.#offset += raw.length;
    this.#complete += blocks.slice(0, -1).reduce((sum, { elements }) => sum + elements.length, 0);
  }

  /** Show all again when something that was missing is here. */
  async #afterwards(fetched) {
    if (!(await fetched)) return;
    this.#offset = this.#complete = 0;
    this.update(this.#text, this.#final);
  }
}
