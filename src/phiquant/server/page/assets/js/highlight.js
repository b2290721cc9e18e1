// Colours for code. A language's grammar is fetched from this server when code in it first appears.

import hljs from "../vendor/highlight/core.min.js";

export const languages = [
  "bash", "c", "cpp", "csharp", "css", "diff", "dockerfile", "go", "ini", "java", "javascript", "json", "kotlin",
  "latex", "lua", "makefile", "markdown", "php", "powershell", "python", "r", "ruby", "rust", "sql", "swift",
  "typescript", "xml", "yaml",
];
const ALIASES = {
  bat: null, console: "bash", sh: "bash", shell: "bash", zsh: "bash",
  "c++": "cpp", cc: "cpp", cxx: "cpp", h: "c", hpp: "cpp", cs: "csharp", "c#": "csharp",
  docker: "dockerfile", golang: "go", toml: "ini", cfg: "ini", conf: "ini",
  js: "javascript", jsx: "javascript", mjs: "javascript", ts: "typescript", tsx: "typescript", jsonc: "json",
  kt: "kotlin", tex: "latex", make: "makefile", md: "markdown", patch: "diff", ps1: "powershell", pwsh: "powershell",
  py: "python", python3: "python", pycon: "python", rb: "ruby", rs: "rust",
  html: "xml", svg: "xml", xhtml: "xml", yml: "yaml", sqlite: "sql", postgresql: "sql", mysql: "sql",
};
const MOST = 60_000; // characters; more would hold up the page
const loading = new Map();

/** The grammar that a fence's word names; null if there is none. */
export function languageOf(word) {
  const name = word.toLowerCase();
  if (languages.includes(name)) return name;
  return Object.hasOwn(ALIASES, name) ? ALIASES[name] : null;
}

/** HTML of coloured code: escaped text in spans with classes; null if it stays plain or the grammar is yet to come. */
export function highlighted(code, language) {
  if (language === null || code.length > MOST || !hljs.getLanguage(language)) return null;
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

/** Fetch a grammar, if it is not here; false if it cannot be had. */
export function load(language) {
  if (!loading.has(language)) {
    const fetched = import(`../vendor/highlight/languages/${language}.min.js`).then(
      (module) => {
        hljs.registerLanguage(language, module.default);
        return true;
      },
      () => {
        loading.delete(language);
        return false;
      },
    );
    loading.set(language, fetched);
  }
  return loading.get(language);
}

export const isLoaded = (language) => Boolean(hljs.getLanguage(language));
