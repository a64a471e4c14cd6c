// A small window at a button, which opens and closes it: Escape and a click elsewhere close it too.

import { h } from "../core/dom.js";

const GAP = 8; // pixels to the button, and to the window's edges

/**
 * Let `button` open what `draw()` gives, drawn when it is opened. Returns what closes it. The element
 * stands behind the button, so that the keyboard goes on in it.
 */
export function attachPopover(button, label, draw) {
  const box = h("div", { class: "popover", popover: "auto", role: "dialog", label });
  button.setAttribute("aria-haspopup", "dialog");
  button.popoverTargetElement = box;
  box.addEventListener("beforetoggle", (event) => {
    if (event.newState === "open") box.replaceChildren(...[draw()].flat());
  });
  box.addEventListener("toggle", (event) => {
    if (event.newState === "open") place(box, button);
  });
  addEventListener("resize", () => box.matches(":popover-open") && place(box, button));
  button.after(box);
  return () => box.matches(":popover-open") && box.hidePopover();
}

function place(box, button) {
  const at = button.getBoundingClientRect();
  const { width } = box.getBoundingClientRect();
  const left = Math.max(GAP, Math.min(at.left, innerWidth - width - GAP));
  box.style.left = `${left}px`;
  box.style.top = `${at.bottom + GAP}px`;
}
