// The data of a training, and the report of their preflight, which comes before anything is trained.

import { ApiError, events } from "../core/api.js";
import { button, fill, h, icon } from "../core/dom.js";
import { number, say } from "../core/texts.js";
import { labelled, saying } from "./parts.js";

const TILES = {
  "conversations": "train_count_conversations",
  "distinct pictures": "train_count_pictures",
  "tokens": "train_count_tokens",
};

/** What a field of the config has that may be given several times: one on each line. */
const asLines = (value) => (Array.isArray(value) ? value : value ? [value] : []);
const read = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

export class Preflight {
  #leaving = null;

  constructor(draft) {
    this.draft = draft;
    this.data = this.#place("data", "train_conversations", "train_conversations_about");
    this.images = this.#place("images", "train_pictures", "train_pictures_about");
    this.button = button("train_check", () => this.run(), { drawing: "search" });
    const waiting = [h("span", { class: "begin-spinner" }), h("span", { say: "train_checking" })];
    this.waiting = h("p", { class: "begin-waiting hint", role: "status", hidden: true }, waiting);
    this.wrong = h("p", { class: "begin-wrong", role: "alert", hidden: true });
    this.hint = h("p", { class: "hint", say: "train_check_first" });
    this.report = h("div", { class: "begin-report", hidden: true });
    this.element = h(
      "div",
      { class: "begin-data" },
      this.data.element,
      this.images.element,
      h("div", { class: "begin-check" }, this.button, this.waiting, this.hint),
      this.wrong,
      this.report,
    );
    this.update();
  }

  #place(name, label, about) {
    const oninput = () => this.draft.set(name, read(control.value));
    const control = h("textarea", { rows: "1", autocomplete: "off", spellcheck: "false", oninput });
    return { control, name, ...labelled(saying(label), control, about) };
  }

  update() {
    for (const { control, name, refuse } of [this.data, this.images]) {
      const value = asLines(this.draft.value(name));
      if (!same(read(control.value), value)) control.value = value.join("\n");
      // A folder may be named for the data, until the preflight has found the file in it.
      refuse(this.draft.isChecked || name === "images" ? this.draft.problemOf(name) : null);
    }
    const { isChecked } = this.draft;
    this.report.hidden = !isChecked;
    this.hint.hidden = isChecked || this.#leaving !== null;
    say(this.button.querySelector("span"), { content: isChecked ? "train_check_again" : "train_check" });
  }

  /** Look the data through. Returns whether the report is there. */
  async run() {
    this.leave();
    const leaving = new AbortController();
    this.#leaving = leaving;
    const { draft } = this;
    Object.assign(draft, { checked: null });
    this.update();
    this.wrong.hidden = true;
    this.waiting.hidden = false;
    this.button.disabled = true;
    const counts = [];
    const asides = [];
    const lines = [];
    let done = false;
    const body = { data: asLines(draft.value("data")), images: asLines(draft.value("images")), preset: draft.preset, values: draft.values };
    try {
      await events(
        "trainings/preflight",
        body,
        (name, data) => {
          if (name === "data") this.#found(data);
          else if (name === "count") counts.push(data);
          else if (name === "aside") asides.push(data);
          else if (name === "line") lines.push(data.text);
          else if (name === "done") done = true;
        },
        { signal: leaving.signal },
      );
      if (!done) throw new ApiError(0, { key: "train_check_ended" });
      this.#draw(counts, asides, lines);
      draft.checked = draft.dataKey;
    } catch (error) {
      if (error.name === "AbortError") return false;
      if (!(error instanceof ApiError)) throw error;
      this.wrong.textContent = error.told();
      this.wrong.hidden = false;
    } finally {
      if (this.#leaving === leaving) {
        this.#leaving = null;
        this.waiting.hidden = true;
        this.button.disabled = false;
      }
    }
    draft.change("checked");
    this.update();
    return draft.isChecked;
  }

  /** Which file and folder were meant. */
  #found({ data, images }) {
    if (!same(data, asLines(this.draft.value("data")))) this.draft.set("data", data);
    if (!same(images, asLines(this.draft.value("images")))) this.draft.set("images", images);
  }

  /** End a check that is under way. */
  leave() {
    this.#leaving?.abort();
    this.#leaving = null;
    this.waiting.hidden = true;
    this.button.disabled = false;
  }

  #draw(counts, asides, lines) {
    const of = (label) => counts.find((one) => one.label === label)?.number ?? 0;
    const aside = asides.reduce((total, { count }) => total + count, 0);
    const tile = (value, key, kind = "") =>
      h("div", { class: `begin-tile ${kind}` }, h("b", {}, number(value)), h("span", { say: key }));
    const good = h("p", { class: "begin-good" }, icon("check"), h("span", { say: "train_check_good" }));
    const bad = h(
      "div",
      { class: "begin-aside" },
      h("p", {}, icon("warning"), h("span", { say: "train_aside" })),
      h("ul", {}, asides.map(({ text }) => h("li", {}, text.replace(/^set aside: /, "")))),
    );
    const table = h(
      "table",
      {},
      h(
        "tbody",
        {},
        counts.map(({ label, inner, number: value, note }) => {
          const cells = [h("th", { scope: "row" }, label), h("td", {}, number(value)), h("td", {}, note ?? "")];
          return h("tr", { class: inner ? "inner" : "" }, cells);
        }),
      ),
    );
    const tiles = Object.entries(TILES).map(([label, key]) => tile(of(label), key));
    const scrolled = { class: "begin-scrolled", tabindex: "0", role: "region", label: "train_report" };
    fill(
      this.report,
      h("div", { class: "begin-tiles" }, tiles, tile(aside, "train_count_aside", aside ? "bad" : "")),
      aside ? bad : good,
      h(
        "details",
        { class: "begin-whole" },
        h("summary", { say: "train_report" }),
        h("div", scrolled, table, h("pre", {}, lines.join("\n"))),
      ),
    );
  }
}
