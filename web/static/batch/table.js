// The answers as a file, or as a table to paste. The server writes them: it knows what spreadsheets
// would take for a formula.

import { blob, save } from "../core/api.js";
import { language } from "../core/texts.js";
import { Row } from "./rows.js";

const LETTERS = 1_000_000; // of one request, well below what the server takes
const ROWS = 2000;

/** The rows that have a result, as the server takes them. */
export function results(rows, question) {
  const told = [];
  for (const row of rows) {
    const result = row.results.get(question);
    if (!result) continue;
    const { answer, error, seconds } = result;
    told.push({ picture: row.name, question, answer, error: error ? Row.told(error) : null, seconds });
  }
  return told;
}

/** They as a Blob; `form`: "csv", "tsv" or "jsonl". */
export async function table(form, rows) {
  const parts = [];
  let head = true;
  for (const portion of portions(rows)) {
    parts.push(await blob("POST", "batches/table", { form, language: language(), rows: portion, head }));
    head = false;
  }
  return new Blob(parts, { type: parts[0].type });
}

function* portions(rows) {
  let portion = [];
  let letters = 0;
  for (const row of rows) {
    portion.push(row);
    letters += row.picture.length + row.question.length + (row.answer ?? row.error ?? "").length;
    if (portion.length >= ROWS || letters >= LETTERS) {
      yield portion;
      [portion, letters] = [[], 0];
    }
  }
  if (portion.length) yield portion;
}

export async function saveTable(form, rows) {
  save(await table(form, rows), `phisight-batch.${form}`);
}

/** Put the rows into the clipboard, to be pasted into a spreadsheet; false where that is not allowed. */
export async function copyTable(rows) {
  const text = await (await table("tsv", rows)).text();
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) {
    console.debug("clipboard:", error?.message); // a page that is not on this machine and has no https
  }
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}
