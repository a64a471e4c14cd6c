// Light, dark, or as the system has it.

import { remember, remembered } from "./remembered.js";

export const THEMES = ["system", "light", "dark"];

/** Colour the page as it was last chosen. */
export function applyTheme() {
  const chosen = remembered("theme", "system");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
}

export function chooseTheme(name) {
  remember("theme", name);
  applyTheme();
}
