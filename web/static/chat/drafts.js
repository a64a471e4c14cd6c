// What was typed and not asked yet, kept over a reload, for every conversation.

import { forget, remember, remembered } from "../core/remembered.js";

const name = (id) => `draft.${id || "new"}`;

/** {text, uploads: [{id, name, kind}]} of a conversation; "" is the new one. */
export const draftOf = (id) => ({ text: "", uploads: [], ...remembered(name(id), {}) });

export function keepDraft(id, draft) {
  if (draft.text || draft.uploads.length) remember(name(id), draft);
  else forget(name(id));
}

/** Put a question that returns before what was typed meanwhile. */
export function addToDraft(id, text, uploads) {
  const other = draftOf(id);
  keepDraft(id, { text: joined(text, other.text), uploads: [...uploads, ...other.uploads] });
}

export const joined = (first, second) => [first, second].filter(Boolean).join("\n");
