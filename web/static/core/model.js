// What the server said at the start, and how its model is.

import { get } from "./api.js";

const listeners = new Set();
let told = null;

/** The last answer of /app/start: {model, can, limits, examples, languages, spoken, language}. */
export const site = () => told;

export async function start() {
  told = await get("start");
  for (const listener of listeners) listener(told);
  if (told.model.state === "loading") setTimeout(() => start().catch(() => setTimeout(start, 3000)), 400);
  return told;
}

/** Call `listener` with the site whenever it has been asked for again. */
export function onSite(listener) {
  listeners.add(listener);
  if (told) listener(told);
  return () => listeners.delete(listener);
}
