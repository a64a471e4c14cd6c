// One turn of the conversation: a question as plain text with its pictures, or an answer.

import { button, fill, h, icon, iconButton } from "../core/dom.js";
import { number, t } from "../core/texts.js";
import { showHtml } from "./markup.js";
import { Thumbnails } from "./pictures.js";

/**
 * `actions`: {copy(text) -> promise, again(turn), edit(turn, text), cut(turn), show(node),
 * picture(name) -> path}. `update` shows a turn, and changes only what differs from the one shown.
 */
export class Message {
  constructor(turn, actions) {
    this.actions = actions;
    this.turn = { pictures: [], versions: [] };
    this.isQuestion = turn.role === "user";
    this.words = this.isQuestion ? h("p", { class: "words", dir: "auto" }) : h("div", { class: "words markdown", dir: "auto" });
    this.thumbnails = this.isQuestion ? new Thumbnails() : null;
    this.body = h("div", { class: this.isQuestion ? "bubble" : "answer" }, this.thumbnails?.element, this.words);
    this.note = h("span", { class: "note" });
    this.versions = h("span", { class: "versions", hidden: true });
    this.under = h("div", { class: "under" }, this.versions, this.#buttons(), this.note);
    this.element = h(
      "article",
      { class: `turn ${turn.role}`, label: this.isQuestion ? "asked_by_you" : "answer", dataset: { role: turn.role } },
      this.body,
      this.under,
    );
    this.update(turn);
  }

  #buttons() {
    const { actions } = this;
    this.again = iconButton("again", this.isQuestion ? "answer_again" : "regenerate", () => actions.again(this.turn), {
      class: "again",
      hidden: this.isQuestion,
    });
    return h(
      "span",
      { class: "actions" },
      this.#copyButton("copy", () => this.turn.text),
      this.again,
      this.isQuestion && iconButton("edit", "edit_question", () => this.edit()),
      iconButton("remove", "delete_from_here", () => actions.cut(this.turn)),
    );
  }

  /** Show a turn; `isLast`: nothing follows it, so that a question may be asked for its answer. */
  update(turn, isLast = false) {
    const before = this.turn;
    this.turn = turn;
    const isPending = typeof turn.node !== "number";
    this.element.dataset.node = turn.node;
    this.element.classList.toggle("pending", isPending);
    this.element.classList.toggle("unread", Boolean(turn.unread));
    if (this.isQuestion) {
      this.thumbnails.show(turn.pictures.map(this.actions.picture), before.isSent);
      if (turn.text !== before.text) this.words.textContent = turn.text;
      this.words.hidden = !turn.text;
      this.again.hidden = !isLast || isPending;
    } else this.#showAnswer(turn, before);
    if (String(turn.versions) !== String(before.versions) || turn.node !== before.node) this.#showVersions();
    if (JSON.stringify(turn.note) !== JSON.stringify(before.note)) this.showNote();
  }

  #showAnswer(turn, before) {
    const isWaiting = Boolean(turn.isWritten) && !turn.html;
    this.element.classList.toggle("written", Boolean(turn.isWritten));
    this.element.classList.toggle("waiting", isWaiting);
    this.element.setAttribute("aria-busy", String(Boolean(turn.isWritten)));
    if (isWaiting) {
      const dots = [h("i"), h("i"), h("i")];
      if (!this.words.querySelector(".dots")) fill(this.words, h("span", { class: "dots", "aria-hidden": "true" }, dots));
    } else if (!turn.text.trim()) {
      fill(this.words, h("p", { class: "nothing", say: "no_answer" }));
    } else if (turn.html !== before.html || before.isWritten) {
      showHtml(this.words, turn.html);
      if (!turn.isWritten) for (const code of this.words.querySelectorAll("pre")) this.#offerCopy(code);
    }
  }

  #offerCopy(code) {
    const box = h("div", { class: "code" });
    code.tabIndex = 0; // wide code is scrolled by the keyboard too
    code.replaceWith(box);
    box.append(code, this.#copyButton("copy_code", () => code.textContent));
  }

  /** A button that copies what `text` gives, and shows for a moment that it has. */
  #copyButton(name, text) {
    const copied = iconButton("copy", name, async () => {
      await this.actions.copy(text());
      fill(copied, icon("check"));
      setTimeout(() => fill(copied, icon("copy")), 1500);
    });
    return copied;
  }

  /** Show how the answer came to its end, in the reader's language. */
  showNote() {
    const { note } = this.turn;
    this.note.textContent = note
      ? t(`status_${note.reason}`, {
          tokens: number(note.tokens ?? 0),
          seconds: number(note.seconds ?? 0, 1),
          rate: number(note.rate ?? 0, (note.rate ?? 0) < 10 ? 1 : 0),
        })
      : "";
  }

  #showVersions() {
    const { versions, node } = this.turn;
    const [at, count] = [versions.indexOf(node), versions.length];
    this.versions.hidden = count < 2;
    if (count < 2) return;
    const turnTo = (index) => this.actions.show(versions[index]);
    const place = h("span", { class: "visually-hidden", say: ["version_of", { number: at + 1, count }] });
    fill(
      this.versions,
      iconButton("back", "version_before", () => turnTo(at - 1), { disabled: at <= 0 }),
      h("span", { class: "count", "aria-hidden": "true" }, `${at + 1}/${count}`),
      place,
      iconButton("forward", "version_after", () => turnTo(at + 1), { disabled: at >= count - 1 }),
    );
  }

  /** Let the question be changed in its place; `text` is what stands in the field first. */
  edit(text = this.turn.text) {
    if (this.form) return;
    const field = h("textarea", { class: "words", label: "edit_question", rows: 1, dir: "auto", value: text });
    const close = () => {
      this.form.remove();
      this.form = null;
      this.element.classList.remove("edited");
    };
    const submit = () => {
      const changed = field.value.trim();
      if (!changed && !this.turn.pictures.length) return;
      close();
      this.actions.edit(this.turn, changed);
    };
    this.form = h(
      "form",
      { class: "edit", onsubmit: (event) => (event.preventDefault(), submit()) },
      field,
      h("div", { class: "edit-buttons" }, button("cancel", close), button("ask_again", submit, { kind: "primary" })),
    );
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.element.classList.add("edited");
    this.body.append(this.form);
    field.focus({ preventScroll: true });
    this.element.scrollIntoView({ block: "nearest" });
    field.setSelectionRange(text.length, text.length);
  }
}
