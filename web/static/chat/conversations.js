// What the sidebar and the bar ask of saved conversations.

import { blob, get, patch, post, remove, save } from "../core/api.js";
import { language } from "../core/texts.js";

const at = (id) => `conversations/${encodeURIComponent(id)}`;

/** The saved conversations, those alone in which a text occurs. */
export const listed = async (query, options) =>
  (await get(`conversations?query=${encodeURIComponent(query)}`, options)).conversations;

/**
 * Give a conversation another title, pin or system prompt. Whatever else was said in it meanwhile,
 * in another window, stays: these say nothing about the turns.
 */
export async function change(id, fields) {
  const { version } = await get(at(id));
  return patch(at(id), { version, ...fields });
}

export const erase = (id) => remove(at(id));
export const restore = (id) => post(`${at(id)}/restore`);

const ENDINGS = { "application/zip": "zip", "application/json": "json" };

/** Have the browser save a conversation; `form` is "markdown" (with its pictures beside it, if it has any) or "json". */
export async function exported(id, title, form) {
  const file = await blob("GET", `${at(id)}/export?form=${form}&language=${language()}`);
  const ending = ENDINGS[file.type.split(";")[0]] ?? "md";
  save(file, `${fileName(title)}.${ending}`);
}

/** A title as the name of a file in any system. */
export const fileName = (title) =>
  title
    .normalize("NFC")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 60) || "conversation";
