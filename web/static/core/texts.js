// The texts of the page in the chosen language; elements that show one change with it.

import { get } from "./api.js";
import { remember, remembered } from "./remembered.js";

let table = {};
let chosen = "en";
const shown = new Map(); // number -> WeakRef of an element that shows texts
const said = new WeakMap(); // element -> {content, title, label, placeholder}
const listeners = new Set();
let next = 0;

/** The text of a key, its {names} filled from `values`. */
export function t(key, values = {}) {
  const text = table[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}

export const language = () => chosen;

/** Have an element show texts, each a key or [key, values], now and after the language changes. */
export function say(element, texts) {
  if (!said.has(element)) shown.set(next++, new WeakRef(element));
  said.set(element, { ...said.get(element), ...texts });
  show(element);
}

function show(element) {
  const { content, title, label, placeholder } = said.get(element);
  if (content) element.textContent = read(content);
  if (title) element.title = read(title);
  if (label) element.setAttribute("aria-label", read(label));
  if (placeholder) element.setAttribute("placeholder", read(placeholder));
}

const read = (text) => (Array.isArray(text) ? t(...text) : t(text));

/** Call `listener` after every change of the language. Returns what ends that. */
export function onLanguage(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** Read the texts of a language and show them everywhere. */
export async function setLanguage(code) {
  table = await get(`texts/${code}`);
  chosen = code;
  document.documentElement.lang = code;
  for (const [number, reference] of shown) {
    const element = reference.deref();
    if (element) show(element);
    else shown.delete(number);
  }
  for (const listener of listeners) listener(code);
}

/** Set the language, and use it at the next visit too. */
export function chooseLanguage(code) {
  remember("language", code);
  return setLanguage(code);
}

export const rememberedLanguage = () => remembered("language", null);

/** A number as the language writes it. */
export const number = (value, digits = 0) =>
  new Intl.NumberFormat(chosen, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

/** A moment, given in seconds since 1970. */
export const moment = (seconds) =>
  new Intl.DateTimeFormat(chosen, { dateStyle: "medium", timeStyle: "short" }).format(new Date(seconds * 1000));

/** A length of time as h:mm:ss, or "12 s" under a minute. */
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const two = (value) => String(value).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}
