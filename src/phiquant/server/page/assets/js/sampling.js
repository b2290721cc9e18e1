// What a sampler can be told: the page's fields, their ranges and their values.

import { read, write } from "./prefs.js";

/** `value` is the page's default, where the server names none; null: not sent, `blank` says what that means. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", value: 0.8, min: 0, max: 5, step: 0.05, hint: "Higher is bolder; 0 always takes the likeliest word." },
  { name: "top_k", label: "Top k", value: 40, min: 0, max: 1_000_000, step: 1, whole: true, hint: "Among the k likeliest tokens; 0 for all." },
  { name: "top_p", label: "Top p", value: 0.95, min: 0, max: 1, step: 0.01, hint: "Among the likeliest that make up this share; 1 for all." },
  { name: "min_p", label: "Min p", value: 0.05, min: 0, max: 1, step: 0.01, hint: "At least this share of the likeliest one; 0 for all." },
  { name: "repeat_penalty", label: "Repeat penalty", value: 1, min: 0.1, max: 5, step: 0.05, hint: "Over 1 holds off what was just said." },
  { name: "max_tokens", label: "Max tokens", value: null, min: 1, max: 1_000_000, step: 1, whole: true, blank: "no limit", hint: "The longest answer; empty: until the context is full." },
  { name: "seed", label: "Seed", value: null, min: 0, max: 4_294_967_295, step: 1, whole: true, blank: "random", hint: "The same seed gives the same answer; empty: another each time." },
];

let chosen = read("sampling", {});
let defaults = Object.fromEntries(FIELDS.map(({ name, value }) => [name, value]));

/** Take a server's defaults over, as /props has them; what does not fit its field is passed over. */
export function useDefaults(params) {
  for (const field of FIELDS) {
    const value = params?.[field.name];
    // A limit of -1 and a random seed are the page's empty fields.
    if (field.value !== null && typeof value === "number" && problem(field, value) === null) defaults[field.name] = value;
  }
}

export const valueOf = (name) => (Object.hasOwn(chosen, name) ? chosen[name] : defaults[name]);

/** What is wrong with a value, as a sentence; null if it will do. */
export function problem(field, value) {
  if (value === null) return field.value === null ? null : "A number is needed here.";
  if (!Number.isFinite(value) || value < field.min || value > field.max) return `From ${field.min} to ${field.max.toLocaleString("en")}.`;
  if (field.whole && !Number.isInteger(value)) return "A whole number.";
  return null;
}

export function choose(name, value) {
  if (value === defaults[name]) delete chosen[name];
  else chosen[name] = value;
  write("sampling", chosen);
}

export function reset() {
  chosen = {};
  write("sampling", null);
}

/** The request's fields. */
export function parameters() {
  const found = {};
  for (const { name } of FIELDS) if (valueOf(name) !== null) found[name] = valueOf(name);
  return found;
}
