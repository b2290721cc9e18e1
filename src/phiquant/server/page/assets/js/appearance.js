// Light, dark, or as the system has it.

import { byId, icon } from "./dom.js";
import { read, write } from "./prefs.js";

const NEXT = { system: "light", light: "dark", dark: "system" };
const NAMES = { system: "System", light: "Light", dark: "Dark" };

export function prepareTheme() {
  const button = byId("theme");
  let theme = read("theme") ?? "system";
  if (!Object.hasOwn(NEXT, theme)) theme = "system";
  const apply = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.replaceChildren(icon(theme), NAMES[theme]);
    button.setAttribute("aria-label", `Appearance: ${NAMES[theme].toLowerCase()}`);
    button.title = `Appearance; next: ${NAMES[NEXT[theme]].toLowerCase()}`;
  };
  button.addEventListener("click", () => {
    theme = NEXT[theme];
    write("theme", theme === "system" ? null : theme);
    apply();
  });
  apply();
}
