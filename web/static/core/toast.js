// Lines that come and go at the edge of the window.

import { ApiError } from "./api.js";
import { button, h, iconButton } from "./dom.js";

const SECONDS = 8;
const shelf = h("div", { class: "toasts", role: "status", "aria-live": "polite" });
document.body.append(shelf);

/**
 * Show a line: `text` is a string of the reader's language. `action` {text: key, run} is a button
 * in it, such as to undo. Returns what takes the line away.
 */
export function toast(text, { kind = "info", action = null, seconds = SECONDS } = {}) {
  const line = h("div", { class: `toast ${kind}` }, h("p", {}, text));
  const leave = () => line.remove();
  for (const former of shelf.querySelectorAll(".toast:not(:has(.button))")) {
    if (former.textContent === text) former.remove(); // not twice
  }
  if (action) {
    line.append(
      button(action.text, () => {
        leave();
        action.run();
      }),
    );
  }
  line.append(iconButton("close", "close", leave));
  shelf.append(line);
  let timer = setTimeout(leave, seconds * 1000);
  line.addEventListener("pointerenter", () => clearTimeout(timer));
  line.addEventListener("pointerleave", () => (timer = setTimeout(leave, seconds * 1000)));
  return leave;
}

/** Tell what a promise was refused with; what was left by the reader himself is not told. */
export function tell(error) {
  if (error?.name === "AbortError") return;
  if (error instanceof ApiError) toast(error.told(), { kind: "error" });
  else throw error;
}
