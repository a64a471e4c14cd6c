// Files dropped anywhere in the window, or pasted, while the chat room is shown.

import { h, icon } from "../core/dom.js";

export function takeFiles(room, take) {
  const given = { class: "drop-veil", hidden: true, "aria-hidden": "true" };
  const veil = h("div", given, icon("pictures"), h("span", { say: "drop_here" }));
  room.append(veil);
  let inside = 0; // elements that the pointer has entered and not left
  const isOurs = (event) => !room.hidden && event.dataTransfer?.types.includes("Files");
  const on = (name, run) => addEventListener(name, (event) => isOurs(event) && (event.preventDefault(), run(event)));
  const show = (count) => {
    inside = Math.max(0, count);
    veil.hidden = inside === 0;
  };
  on("dragenter", () => show(inside + 1));
  on("dragleave", () => show(inside - 1));
  on("dragover", () => {});
  on("drop", (event) => {
    show(0);
    take([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (room.hidden || !files.length || document.querySelector("dialog[open]")) return;
    const isInField = event.target.closest?.("textarea, input");
    if (!isInField || !event.clipboardData.getData("text/plain")) event.preventDefault(); // words beside them are pasted too
    take(files);
  });
}
