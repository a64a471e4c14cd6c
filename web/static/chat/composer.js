// Where questions are typed: it grows upward, takes pictures, and keeps what was not asked yet.

import { ApiError } from "../core/api.js";
import { h, iconButton } from "../core/dom.js";
import { tell } from "../core/toast.js";
import { asKept, Attachments } from "./attachments.js";
import { addToDraft, draftOf, joined, keepDraft } from "./drafts.js";

const GROWS_ALONE = CSS.supports("field-sizing", "content");
const KEPT_AFTER = 400; // milliseconds without a key

export class Composer {
  constructor(chat) {
    this.chat = chat;
    const hint = matchMedia("(pointer: coarse)").matches ? "question_by_touch" : "question_here"; // fingers drop no pictures
    this.isWaiting = false; // for uploads, to ask as soon as they are sent
    this.field = h("textarea", { rows: 1, placeholder: hint, label: "question", dir: "auto", enterkeyhint: "send" });
    this.attachments = new Attachments(() => this.#changed());
    const accepted = { type: "file", multiple: true, accept: "image/*,audio/*" };
    const chooser = h("input", { ...accepted, hidden: true }); // its button has the name
    chooser.addEventListener("change", () => {
      this.attachments.add(chooser.files);
      chooser.value = "";
      this.focus();
    });
    this.tools = h("span", { class: "tools" });
    this.waits = h("span", { class: "waits", role: "status" });
    this.sendButton = iconButton("send", "ask", () => this.send(), { class: "send" });
    this.stopButton = iconButton("stop", "stop", (event) => this.#stop(event), { class: "stop", hidden: true });
    this.element = h(
      "form",
      { class: "composer", id: "question", onsubmit: (event) => event.preventDefault() },
      this.attachments.element,
      this.field,
      h(
        "div",
        { class: "composer-row" },
        iconButton("attach", "attach", () => chooser.click()),
        chooser,
        this.tools,
        this.waits,
        this.sendButton,
        this.stopButton,
      ),
    );
    this.field.addEventListener("keydown", (event) => this.#key(event));
    this.field.addEventListener("input", () => this.#changed());
    addEventListener("pagehide", () => this.#keep());
    this.openDraft();
  }

  #key(event) {
    const isComposing = event.isComposing || event.keyCode === 229; // Enter chooses a character
    if (event.key !== "Enter" || event.shiftKey || isComposing) return;
    event.preventDefault();
    this.send();
  }

  #changed() {
    if (!GROWS_ALONE) {
      this.field.style.height = "auto";
      this.field.style.height = `${this.field.scrollHeight}px`;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#keep(), KEPT_AFTER);
  }

  #keep() {
    clearTimeout(this.timer);
    keepDraft(this.draft, { text: this.field.value, uploads: this.attachments.kept() });
  }

  /** Put text where the cursor is, such as what was heard. */
  insert(text) {
    const { selectionStart, selectionEnd, value } = this.field;
    const gap = selectionStart > 0 && !/\s$/.test(value.slice(0, selectionStart)) ? " " : "";
    this.field.setRangeText(gap + text, selectionStart, selectionEnd, "end");
    this.#changed();
  }

  /** Put a question there that is still to be asked, in place of the one that was suggested before. */
  suggest(question) {
    const { field } = this;
    if (field.value === this.suggested) field.value = "";
    if (field.value) field.setSelectionRange(field.value.length, field.value.length);
    this.insert(question);
    this.suggested = field.value;
    this.focus();
  }

  focus() {
    if (matchMedia("(pointer: fine)").matches) this.field.focus({ preventScroll: true });
  }

  /** Show the draft of the conversation that is open now; the one shown is kept for its own. */
  openDraft() {
    if (this.draft === this.chat.id) return;
    if (this.draft !== undefined) this.#leaveDraft();
    this.draft = this.chat.id;
    this.#wait(false);
    const { text, uploads } = draftOf(this.draft);
    this.field.value = text;
    this.#changed();
    this.attachments.restore(uploads).catch(tell);
  }

  #leaveDraft() {
    const { draft } = this;
    this.#keep();
    for (const item of this.attachments.takeOut()) {
      if (!item.id) item.sent.then((isSent) => isSent && item.id && addToDraft(draft, "", [asKept(item)]));
    }
  }

  /** The question that is being typed goes on in a conversation that has got its id by being asked. */
  moveDraft() {
    if (this.draft === this.chat.id) return;
    keepDraft(this.draft, { text: "", uploads: [] });
    this.draft = this.chat.id;
    this.#keep();
  }

  /** Ask what was typed, as soon as its uploads are sent. */
  async send() {
    const { chat, field, attachments } = this;
    if (chat.busy) return tell(new ApiError(409, { key: "still_answering" }));
    if (this.isWaiting) return undefined;
    if (!field.value.trim() && !attachments.count) return tell(new ApiError(409, { key: "ask_something" }));
    const { draft } = this;
    this.#wait(attachments.isSending);
    const isSent = await attachments.settled();
    const isOther = this.draft !== draft;
    this.#wait(false);
    if (!isSent || isOther || chat.busy) return undefined; // told already; the question stays
    const question = { text: field.value.trim(), items: attachments.takeOut() };
    field.value = "";
    this.#changed();
    this.#keep();
    const uploads = question.items.map((item) => item.id);
    const pictures = question.items.map((item) => item.source).filter(Boolean);
    try {
      await chat.ask({ text: question.text, uploads, pictures });
    } catch (error) {
      if (!error.asked) this.#takeBack(question, draft);
      tell(error);
    }
    return undefined;
  }

  #wait(isWaiting) {
    this.isWaiting = isWaiting;
    this.element.classList.toggle("waiting", isWaiting);
    this.waits.replaceChildren(...(isWaiting ? [h("span", { say: "asked_when_sent" })] : []));
  }

  /** A question that was refused stands here again, before what was typed meanwhile. */
  #takeBack({ text, items }, draft) {
    if (this.draft !== draft) {
      addToDraft(draft, text, items.map(asKept));
      return;
    }
    this.field.value = joined(text, this.field.value);
    this.attachments.putBack(items);
    this.#keep();
  }

  /** The second click of a double click on "send" is not meant for "stop", which takes its place. */
  #stop(event) {
    if (event.detail < 2) this.chat.stop().catch(tell);
  }

  /** Show whether an answer is being written. */
  showBusy() {
    const { busy } = this.chat;
    const hadFocus = [this.sendButton, this.stopButton].includes(document.activeElement);
    this.sendButton.hidden = busy;
    this.stopButton.hidden = !busy;
    if (hadFocus) (busy ? this.stopButton : this.sendButton).focus();
  }
}
