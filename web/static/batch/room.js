// The batch room: one question about many pictures.

import { onSite, site } from "../core/model.js";
import { remember, remembered } from "../core/remembered.js";
import { settings } from "../core/settings.js";
import { number, onLanguage, t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { listen } from "./arriving.js";
import { List } from "./list.js";
import { Run } from "./run.js";
import { openSaving } from "./saving.js";
import { Sender } from "./sending.js";
import { results } from "./table.js";
import { View } from "./view.js";

const KEPT = "batch.question";
const DRAWN_EVERY = 200; // ms

export function mount(element) {
  const room = new Batch(element);
  return { show: () => room.draw(), hide: () => room.hide() };
}

class Batch {
  asked = []; // questions, the first first; each is a column
  question = ""; // whose column is shown
  run = null;
  #unsaved = 0; // answers that are in no file yet
  #drawing = 0;
  #leaveToast = () => {};

  constructor(element) {
    const take = (files) => this.#take(files);
    this.view = new View(element, remembered(KEPT, ""), {
      take,
      typed: () => this.#typed(),
      pressed: (event) => this.#onKey(event),
      main: () => this.#onMain(),
      again: () => this.#askAgain(this.list.errors(this.question)),
      save: (anchor) => openSaving(anchor, () => results(this.list.rows, this.question), () => (this.#unsaved = 0)),
      clear: () => this.#clearAll(),
      choose: (question) => this.#choose(question),
    });
    this.list = new List(this.view.body, new Sender(site().limits.upload), {
      remove: (row) => this.#remove(row),
      again: (row) => this.#askAgain([row]),
    });
    listen(element, this.view.table, take);
    addEventListener("beforeunload", (event) => (this.run || this.#unsaved) && event.preventDefault());
    onLanguage(() => this.draw());
    onSite(() => this.run && this.draw());
    this.draw();
  }

  draw() {
    const { list, run, question, asked } = this;
    const { length: count } = list.rows;
    const typed = this.#typedQuestion;
    const wrong = list.errors(question).length;
    const done = count - list.unasked(question).length - wrong;
    const isBegun = list.rows.some((row) => row.results.has(typed));
    this.view.draw({ count, done, wrong, run, typed, isAllAsked: list.isAllAsked(typed), isBegun, asked, question });
  }

  hide() {
    this.view.table.classList.remove("dropping");
  }

  // -- the list ---------------------------------------------------------------------------------

  #take({ found, passedOver }) {
    const added = this.list.add(found, this.question);
    const twice = found.length - added.length;
    const lines = [twice && t("batch_twice", { count: number(twice) }), passedOver && t("batch_passed_over", { count: number(passedOver) })];
    if (lines.some(Boolean)) toast(lines.filter(Boolean).join(" "));
    this.run?.add(added);
    this.draw();
  }

  #remove(row) {
    const beside = (row.element.nextElementSibling ?? row.element.previousElementSibling)?.querySelector(".batch-remove");
    const at = this.list.remove(row);
    (beside ?? this.view.field).focus();
    this.#offerUndo(t("batch_removed", { name: row.file.name }), () => this.#putBack([row], at));
    this.draw();
  }

  #clearAll() {
    const former = { asked: this.asked, question: this.question, unsaved: this.#unsaved };
    this.run?.stop();
    const rows = this.list.clear();
    [this.asked, this.question, this.#unsaved] = [[], "", 0];
    this.view.field.focus();
    this.#offerUndo(t("batch_cleared"), () => {
      this.asked = [...former.asked, ...this.asked.filter((question) => !former.asked.includes(question))];
      this.#unsaved += former.unsaved;
      this.#putBack(rows, 0);
      this.#showColumn(this.run?.question ?? former.question);
    });
    this.draw();
  }

  #putBack(rows, at) {
    this.list.putBack(rows, at, this.question);
    this.run?.add(rows);
    this.draw();
  }

  #offerUndo(text, run) {
    this.#leaveToast();
    this.#leaveToast = toast(text, { action: { text: "undo", run } });
  }

  // -- asking -----------------------------------------------------------------------------------

  get #typedQuestion() {
    return this.view.field.value.trim().toWellFormed(); // JSON can carry half a character, and no server takes it
  }

  #typed() {
    remember(KEPT, this.view.field.value);
    this.draw();
  }

  #onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    const typed = this.#typedQuestion;
    if (this.run) toast(t("batch_running"));
    else if (this.list.isAllAsked(typed)) toast(t("batch_all_asked"));
    else this.#ask(typed);
  }

  #onMain() {
    const typed = this.#typedQuestion;
    if (this.run) this.run.stop();
    else if (this.list.isAllAsked(typed)) this.#askAgain(this.list.rows, typed);
    else this.#ask(typed);
  }

  /** Forget what became of some rows, and ask about them. */
  #askAgain(rows, question = this.question) {
    for (const row of rows) {
      row.results.delete(question);
      row.draw();
    }
    if (this.run?.question === question) this.run.add(rows);
    else if (this.run) toast(t("batch_running"));
    else this.#ask(question, rows);
    this.draw();
  }

  /** Ask about the rows that have no result, or about some of them. */
  async #ask(question, rows = this.list.unasked(question)) {
    if (!question || !this.list.rows.length) {
      toast(t("batch_needs"));
      if (!question) this.view.field.focus();
      return;
    }
    if (!this.asked.includes(question)) this.asked.push(question);
    this.#showColumn(question);
    const { sender } = this.list;
    this.run = new Run({ rows, question, settings: settings(), sender, onFinish: () => this.#onFinish() });
    this.draw();
    this.view.announce(true);
    try {
      await this.run.go();
    } catch (error) {
      tell(error);
    } finally {
      this.run = null;
      this.draw();
      this.view.announce(true);
    }
  }

  #onFinish() {
    this.#unsaved += 1;
    if (this.#drawing) return;
    this.#drawing = setTimeout(() => {
      this.#drawing = 0;
      this.draw();
      this.view.announce();
    }, DRAWN_EVERY);
  }

  // -- the questions ----------------------------------------------------------------------------

  /** Show a former question's answers, and have it in the field: it can be gone on with. */
  #choose(question) {
    this.view.field.value = question;
    remember(KEPT, question);
    this.#showColumn(question);
  }

  #showColumn(question) {
    this.question = question;
    this.list.show(question);
    this.draw();
  }
}
