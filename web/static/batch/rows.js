// One picture of the batch in the list: its thumbnail, what was answered, and how far it is.

import { blob } from "../core/api.js";
import { fill, h, icon, iconButton } from "../core/dom.js";
import { number, t } from "../core/texts.js";

const WAITING = { kind: "waiting" };
const byElement = new WeakMap();

// Thumbnails are there while their rows are near the window, so that a thousand large pictures take
// no more memory than a few.
const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const row = byElement.get(target);
      if (isIntersecting) row.showThumbnail();
      else row.hideThumbnail();
    }
  },
  { scrollMargin: "600px", rootMargin: "600px" },
);

export class Row {
  upload = null; // its id on the server, while it is kept there
  removed = false;
  results = new Map(); // question -> {answer, error, seconds}; `error` as a refusal tells it
  state = WAITING;
  #question = "";
  #thumbnail = null;

  /** `actions`: {open, remove, again}, each called with the row. */
  constructor({ file, folder }, actions) {
    this.file = file;
    this.name = (folder ? `${folder}/${file.name}` : file.name).toWellFormed();
    this.actions = actions;
    this.image = h("img", { alt: "", decoding: "async" });
    this.image.addEventListener("error", () => this.#showConverted());
    this.thumb = h(
      "button",
      { type: "button", class: "batch-thumb", label: ["batch_open", { name: this.name }], onclick: () => actions.open(this) },
      icon("pictures"),
      this.image,
    );
    const named = h("div", { class: "batch-name" }, h("span", {}, file.name), folder && h("small", {}, folder));
    this.answer = h("div", { class: "batch-answer" });
    this.time = h("span", { class: "batch-time" });
    this.element = h(
      "div",
      { class: "batch-row", role: "row" },
      h("div", { class: "batch-cell-picture", role: "cell" }, this.thumb, named),
      h(
        "div",
        { class: "batch-cell-answer", role: "cell" },
        this.answer,
        this.time,
        iconButton("close", "batch_remove", () => actions.remove(this), { class: "batch-remove" }),
      ),
    );
    byElement.set(this.element, this);
    near.observe(this.element);
  }

  /** Show what became of a question. */
  show(question) {
    this.#question = question;
    this.draw();
  }

  /** {kind: "waiting"}, {kind: "sending", share} or {kind: "asked"}. */
  set(state) {
    this.state = state;
    this.draw();
  }

  finish(question, result) {
    this.results.set(question, result);
    this.state = WAITING;
    this.draw();
  }

  draw() {
    const result = this.state.kind === "waiting" ? this.results.get(this.#question) : null;
    const kind = result ? (result.error ? "failed" : "answered") : this.state.kind;
    this.element.dataset.state = kind;
    this.time.textContent = kind === "answered" ? `${number(Math.max(0.01, result.seconds), result.seconds < 1 ? 2 : 1)} s` : "";
    if (kind === "answered") {
      if (result.answer) this.answer.textContent = result.answer;
      else fill(this.answer, h("em", { say: "batch_no_words" }));
    } else if (kind === "failed") fill(this.answer, this.#failure(result.error));
    else if (kind === "sending") fill(this.answer, h("em", { say: ["batch_sending", { share: Math.round(100 * this.state.share) }] }));
    else if (kind === "asked") fill(this.answer, h("em", { class: "batch-asked", say: "batch_asked" }));
    else fill(this.answer, h("em", { say: "batch_waits" }));
  }

  #failure(error) {
    return [
      h("p", { class: "batch-error" }, icon("warning"), h("span", error.key ? { say: [error.key, error.values] } : {}, error.text)),
      iconButton("again", "batch_again", () => this.actions.again(this)),
    ];
  }

  /** One line of an error, for a table. */
  static told(error) {
    return error.key ? t(error.key, error.values) : error.text;
  }

  showThumbnail() {
    if (this.#thumbnail) return;
    this.#thumbnail = URL.createObjectURL(this.file);
    this.image.src = this.#thumbnail;
  }

  hideThumbnail() {
    if (!this.#thumbnail) return;
    URL.revokeObjectURL(this.#thumbnail);
    this.#thumbnail = null;
    this.image.removeAttribute("src");
  }

  /** A TIFF, which browsers do not show: the server has it as PNG, once it is there. */
  async #showConverted() {
    const shown = this.#thumbnail;
    this.image.removeAttribute("src"); // the drawing behind it is shown, and not the browser's sign of a broken picture
    if (!shown || !this.upload || this.converted) return;
    this.converted = true;
    try {
      const picture = await blob("GET", `uploads/${this.upload}`);
      if (this.#thumbnail !== shown) return;
      URL.revokeObjectURL(shown);
      this.#thumbnail = URL.createObjectURL(picture);
      this.image.src = this.#thumbnail;
    } catch (error) {
      console.debug("no thumbnail:", this.name, error.message); // what is wrong with it is told when it is asked about
    }
  }

  /** Leave the list; it may come back. */
  leave() {
    this.removed = true;
    this.hideThumbnail();
    this.element.remove();
  }
}
