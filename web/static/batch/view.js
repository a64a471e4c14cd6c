// What the batch room shows: its elements, and how they tell how far the batch is.

import { button, fill, h, icon, iconButton } from "../core/dom.js";
import { site } from "../core/model.js";
import { number, say, span, t } from "../core/texts.js";
import { chooser } from "./arriving.js";

const ANNOUNCED_EVERY = 10_000; // ms; a screen reader is not to read every answer's number

export class View {
  #announced = 0;

  /** `does`: {typed, pressed(event), main, again, save, clear, take(files), choose(question)}. */
  constructor(element, question, does) {
    this.does = does;
    this.field = h("textarea", {
      rows: "1",
      maxlength: "20000",
      label: "question",
      placeholder: "batch_placeholder",
      value: question,
      oninput: does.typed,
      onkeydown: does.pressed,
    });
    this.main = button("batch_ask", (event) => event.detail < 2 && does.main(), { kind: "primary", class: "batch-main" });
    this.pictures = chooser(does.take);
    this.folder = chooser(does.take, { ofFolder: true });
    this.body = h("div", { class: "batch-body", role: "rowgroup" });
    this.live = h("div", { class: "visually-hidden", role: "status" });
    element.append(
      h("header", {}, h("h1", { say: "batch" }), h("p", { class: "hint", say: "batch_intro" })),
      h(
        "div",
        { class: "card batch-ask" },
        this.field,
        h("div", { class: "batch-ask-foot" }, h("span", { class: "hint", say: "batch_keys" }), this.main),
      ),
      ...this.#tools(),
      this.#table(),
      this.live,
      this.pictures,
      this.folder,
    );
  }

  /** What stands between the question and the list. */
  #tools() {
    const { does } = this;
    this.told = h("p", { class: "batch-told" });
    this.again = button("batch_errors_again", does.again, { drawing: "again" });
    this.add = button("batch_add", () => this.pictures.click(), { drawing: "add" });
    this.addFolder = button("batch_add_folder", () => this.folder.click(), { drawing: "add" });
    this.save = button("batch_save", () => does.save(this.save), { drawing: "download", "aria-haspopup": "menu" });
    this.clear = iconButton("remove", "batch_clear", does.clear);
    this.done = h("div", { class: "batch-bar-done" });
    this.wrong = h("div", { class: "batch-bar-wrong" });
    this.bar = h("div", { class: "batch-bar", role: "progressbar", label: "batch_progress", "aria-valuemin": "0" }, this.done, this.wrong);
    this.columns = h("div", { class: "batch-columns", role: "group", label: "batch_columns" });
    const actions = h("div", { class: "batch-actions" }, this.again, this.add, this.addFolder, this.save, this.clear);
    return [h("div", { class: "batch-tools" }, this.told, actions), this.bar, this.columns];
  }

  #table() {
    this.headQuestion = h("span", { class: "batch-head-question" });
    this.empty = this.#emptyPlace();
    this.table = h(
      "div",
      { class: "batch-table" },
      h(
        "div",
        { role: "table", label: "batch_list", class: "batch-grid" },
        h(
          "div",
          { class: "batch-head", role: "row" },
          h("div", { role: "columnheader", say: "picture" }),
          h("div", { role: "columnheader" }, h("span", { say: "answer" }), this.headQuestion),
        ),
        this.body,
      ),
      this.empty,
      h("div", { class: "batch-veil" }, icon("download"), h("span", { say: "batch_drop_now" })),
    );
    return this.table;
  }

  #emptyPlace() {
    return h(
      "div",
      { class: "batch-empty" },
      icon("pictures"),
      h("p", { class: "batch-empty-line", say: "batch_drop" }),
      h(
        "div",
        { class: "batch-empty-buttons" },
        button("batch_choose", () => this.pictures.click(), { drawing: "add" }),
        button("batch_choose_folder", () => this.folder.click()),
      ),
      h("p", { class: "hint", say: ["batch_drop_hint", { megabytes: site().limits.upload >> 20 }] }),
    );
  }

  /**
   * Show how far it is: `count` pictures, of which `done` and `wrong` have a result of `question`; the
   * `typed` one is `isAllAsked` or `isBegun`; `run` is under way or null; `asked` are all questions.
   */
  draw(state) {
    const { count, done, wrong, run, typed, isAllAsked, isBegun, asked, question } = state;
    const text = run ? "stop" : isAllAsked ? "batch_all_again" : isBegun ? "batch_go_on" : "batch_ask";
    say(this.main.querySelector("span"), { content: text });
    this.main.classList.toggle("primary", !run && !isAllAsked);
    this.empty.hidden = count > 0;
    this.table.classList.toggle("filled", count > 0);
    this.add.hidden = this.addFolder.hidden = this.clear.hidden = !count;
    this.save.hidden = !(done + wrong);
    this.again.hidden = !wrong || Boolean(run);
    say(this.again.querySelector("span"), { content: ["batch_errors_again", { count: number(wrong) }] });
    this.told.textContent = told(state);
    this.bar.hidden = !run && !(done + wrong);
    this.bar.setAttribute("aria-valuemax", count);
    this.bar.setAttribute("aria-valuenow", done + wrong);
    this.bar.setAttribute("aria-valuetext", this.told.textContent);
    this.done.style.width = `${(100 * done) / Math.max(1, count)}%`;
    this.wrong.style.width = `${(100 * wrong) / Math.max(1, count)}%`;
    this.#drawColumns(asked, question);
    this.headQuestion.textContent = this.columns.hidden && typed !== question ? question : ""; // told elsewhere
  }

  #drawColumns(asked, question) {
    this.columns.hidden = asked.length < 2;
    if (this.columns.hidden) return;
    const shown = [...this.columns.children].map((one) => one.title).join("\n");
    if (shown !== asked.join("\n")) fill(this.columns, asked.map((one) => this.#column(one)));
    for (const one of this.columns.children) one.setAttribute("aria-pressed", one.title === question);
  }

  #column(question) {
    const one = h("button", { type: "button", class: "batch-column", onclick: () => this.does.choose(question) }, question);
    one.title = question;
    return one;
  }

  /** Have a screen reader told how far it is: now, or if that was not done for a while. */
  announce(now = false) {
    if (!now && performance.now() - this.#announced < ANNOUNCED_EVERY) return;
    this.#announced = performance.now();
    this.live.textContent = this.told.textContent;
  }
}

function told({ count, done, wrong, run }) {
  if (!count) return "";
  if (!run && !(done + wrong)) return t("batch_count", { count: number(count) });
  if (run && site().model.state === "loading") return t("batch_model_loading");
  const lines = [t("batch_done", { done: number(done), total: number(count) })];
  if (wrong) lines.push(t("batch_failed", { count: number(wrong) }));
  const pace = run?.pace();
  if (pace) lines.push(t("batch_left", { time: span(pace * (count - done - wrong)) }));
  if (!run && done + wrong < count) lines.push(t("batch_stopped"));
  return lines.join(" · ");
}
