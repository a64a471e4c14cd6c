// The menu in which the answers are saved or copied.

import { openMenu } from "../core/dialog.js";
import { t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { copyTable, saveTable } from "./table.js";

/** Open it at a button; `told()` gives the rows of a table, and `onSaved` is called when they are kept. */
export function openSaving(anchor, told, onSaved) {
  const as = (form) => () => saveTable(form, told()).then(onSaved, tell);
  openMenu(anchor, [
    { text: "batch_csv", drawing: "download", run: as("csv") },
    { text: "batch_jsonl", drawing: "download", run: as("jsonl") },
    { text: "batch_copy", drawing: "copy", run: () => copy(told(), onSaved).catch(tell) },
  ]);
}

async function copy(rows, onSaved) {
  const done = await copyTable(rows);
  if (done) onSaved();
  toast(t(done ? "batch_copied" : "batch_not_copied"), { kind: done ? "info" : "error" });
}
