// The pictures in their order, and what is known of each: put in, taken out and brought back.

import { openLightbox } from "../core/dialog.js";
import { identity } from "./files.js";
import { Row } from "./rows.js";

export class List {
  rows = [];

  /** `body` holds the rows' elements; `actions`: {remove(row), again(row)}. */
  constructor(body, sender, actions) {
    Object.assign(this, { body, sender });
    this.actions = { ...actions, open: (row) => this.#open(row) };
  }

  /** The rows of the files that are not in the list yet; they show a question's answers. */
  add(found, question) {
    const known = new Set(this.rows.map((row) => row.identity));
    const added = [];
    for (const one of found) {
      const name = identity(one);
      if (known.has(name)) continue;
      known.add(name);
      const row = new Row(one, this.actions);
      row.identity = name;
      row.show(question);
      added.push(row);
    }
    this.rows.push(...added);
    this.body.append(...added.map((row) => row.element));
    return added;
  }

  /** Take one out; returns where it was. */
  remove(row) {
    const at = this.rows.indexOf(row);
    this.#takeOut([row]);
    this.rows.splice(at, 1);
    return at;
  }

  /** Take all out, and return them. */
  clear() {
    const former = this.rows;
    this.#takeOut(former);
    this.rows = [];
    return former;
  }

  /** Bring rows back to where they were; they show a question's answers. */
  putBack(rows, at, question) {
    const after = this.rows[at]?.element ?? null;
    for (const row of rows) this.body.insertBefore(row.element, after);
    this.rows.splice(at, 0, ...rows);
    for (const row of rows) {
      row.removed = false;
      row.show(question);
    }
  }

  show(question) {
    for (const row of this.rows) row.show(question);
  }

  /** The rows that a question has no result for. */
  unasked(question) {
    return this.rows.filter((row) => !row.results.has(question));
  }

  errors(question) {
    return this.rows.filter((row) => row.results.get(question)?.error);
  }

  isAllAsked(question) {
    return this.rows.length > 0 && question !== "" && !this.unasked(question).length;
  }

  #takeOut(rows) {
    for (const row of rows) {
      row.leave();
      this.sender.forget(row);
    }
  }

  async #open(row) {
    const urls = this.rows.map((one) => URL.createObjectURL(one.file));
    await openLightbox(urls, this.rows.indexOf(row));
    document.querySelector(".lightbox").addEventListener("close", () => urls.forEach((url) => URL.revokeObjectURL(url)));
  }
}
