// Small values that outlive the page, in localStorage; in a browser that keeps nothing they last as long as the page.

const fallback = new Map();

export function read(name, otherwise = null) {
  try {
    const text = localStorage.getItem(`phiquant.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return fallback.has(name) ? fallback.get(name) : otherwise;
  }
}

/** Keep a value; null forgets it. */
export function write(name, value) {
  fallback.set(name, value);
  try {
    if (value === null) localStorage.removeItem(`phiquant.${name}`);
    else localStorage.setItem(`phiquant.${name}`, JSON.stringify(value));
  } catch {
    // Full, or forbidden: `fallback` has it.
  }
}
