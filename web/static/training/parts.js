// What the windows of the training room are made of.

import { h, iconButton } from "../core/dom.js";
import { t } from "../core/texts.js";
import { toast } from "../core/toast.js";

/** The text of a problem that the server told: a key of web/texts, or a line. */
export const problemText = ({ key, text }) => (key ? t(key) : text);

let fieldNumber = 0;

/** A labelled control: its name, the control, what it is about, and a place for what is wrong. */
export function labelled(label, control, about = null, more = []) {
  const id = `begin-field-${++fieldNumber}`;
  const wrong = h("p", { class: "begin-wrong", id: `${id}-wrong`, hidden: true });
  const told = about && h("small", { id: `${id}-about`, say: about.line ? null : about }, about.line ?? null);
  control.id = id;
  control.setAttribute("aria-describedby", [told && `${id}-about`, `${id}-wrong`].filter(Boolean).join(" "));
  const element = h("div", { class: "begin-field" }, h("div", { class: "begin-label" }, label(id), more), control, told, wrong);
  return {
    element,
    /** Show what is wrong with the control, or that nothing is. */
    refuse(problem) {
      wrong.hidden = !problem;
      wrong.textContent = problem ? problemText(problem) : "";
      control.setAttribute("aria-invalid", String(Boolean(problem)));
    },
  };
}

/** A field for a path or a name, which the browser leaves as it is typed. */
export const textInput = (oninput, more = {}) => h("input", { type: "text", autocomplete: "off", spellcheck: "false", oninput, ...more });

/** A label that says a text of web/texts. */
export const saying = (key) => (id) => h("label", { for: id, say: key });

/** The command line, to be read and copied. */
export class CommandBox {
  constructor() {
    this.code = h("code", {});
    const scrolled = h("div", { class: "begin-code", tabindex: "0", role: "region", label: "train_command" }, this.code);
    const copy = iconButton("copy", "train_copy", () => this.copy());
    this.element = h("div", { class: "begin-command", title: "train_command" }, scrolled, copy);
  }

  update(command) {
    this.code.textContent = command;
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.code.textContent);
    } catch (error) {
      console.debug("the browser's clipboard is closed:", error.message); // a page without https, mostly
      const area = h("textarea", { value: this.code.textContent, class: "visually-hidden" });
      this.element.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    toast(t("train_copied"), { seconds: 2 });
  }
}
