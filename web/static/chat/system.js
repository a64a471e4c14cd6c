// What the model is told before a conversation's first question.

import { ApiError } from "../core/api.js";
import { openDialog } from "../core/dialog.js";
import { button, h } from "../core/dom.js";
import { number } from "../core/texts.js";
import { change } from "./conversations.js";

export const LONGEST = 8000; // characters: MAX_SYSTEM of web/chat/conversation.py

/**
 * Open the field of the conversation that is open; that of a new one goes with its first question.
 * `onKept` is called when another text was kept.
 */
export function openSystemPrompt(chat, onKept) {
  const { conversation } = chat;
  const before = conversation ? conversation.system : chat.system;
  const field = h("textarea", {
    id: "system-prompt",
    rows: 7,
    maxlength: LONGEST,
    placeholder: "system_example",
    "aria-describedby": "system-help",
    value: before,
  });
  const count = h("small", { class: "system-count" });
  const failed = h("p", { class: "form-error", role: "alert", hidden: true });
  const save = button("system_save", () => keep(field.value.trim()), { kind: "primary" });
  const clear = button("system_clear", () => keep(""), { hidden: !before });
  const body = h(
    "form",
    { class: "system-form" },
    h("div", { class: "field" }, h("label", { for: "system-prompt", say: "system_label" }), field, count),
    h("p", { id: "system-help", class: "hint", say: conversation ? "system_help" : "system_help_new" }),
    failed,
    h("footer", {}, clear, h("span", { class: "spacer" }), button("cancel", () => close()), save),
  );
  body.addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("input", tellLength);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) keep(field.value.trim());
  });
  const close = openDialog("system_prompt", body, { class: "system-dialog" });
  field.focus();
  tellLength();

  function tellLength() {
    count.textContent = `${number(field.value.length)} / ${number(LONGEST)}`;
  }

  async function keep(text) {
    if (!conversation) {
      chat.system = text;
      onKept();
      return close();
    }
    save.disabled = clear.disabled = true;
    try {
      const changed = await change(conversation.id, { system: text });
      if (!chat.busy) chat.take(changed);
      onKept();
      close();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      failed.textContent = error.told();
      failed.hidden = false;
    } finally {
      save.disabled = clear.disabled = false;
    }
  }
}
