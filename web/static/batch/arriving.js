// The ways in which pictures come to the room: chosen, dropped anywhere in it, or pasted.

import { h } from "../core/dom.js";
import { toast } from "../core/toast.js";
import { dropped, sorted } from "./files.js";

/** A field that lets files, or a whole folder of them, be chosen; `take` is called with what `sorted` gives. */
export function chooser(take, { ofFolder = false } = {}) {
  const input = h("input", {
    type: "file",
    multiple: true,
    hidden: true,
    accept: ofFolder ? null : "image/*",
    label: ofFolder ? "batch_choose_folder" : "batch_choose",
    webkitdirectory: ofFolder,
    onchange: () => {
      take(sorted([...input.files], { ofFolder }));
      input.value = ""; // the same may be chosen again
    },
  });
  return input;
}

/** Take what is dropped or pasted while a room is shown; `marked` is marked while something is above it. */
export function listen(room, marked, take) {
  const isFiles = (event) => !room.hidden && event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    marked.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => !event.relatedTarget && marked.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    marked.classList.remove("dropping");
    if (!isFiles(event)) return;
    event.preventDefault();
    dropped(event.dataTransfer).then(take, (error) => toast(error.message, { kind: "error" }));
  });
  addEventListener("paste", (event) => {
    if (room.hidden || !event.clipboardData?.files.length) return;
    event.preventDefault();
    take(sorted([...event.clipboardData.files]));
  });
}
