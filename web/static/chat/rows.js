// A conversation in the list, and what its menu does.

import { ApiError, objectUrl } from "../core/api.js";
import { openMenu } from "../core/dialog.js";
import { h, icon, iconButton } from "../core/dom.js";
import { go, link } from "../core/router.js";
import { moment, t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { change, erase, exported, restore } from "./conversations.js";
import { shortly } from "./dates.js";

/** The name that a conversation goes by; a damaged one has none of its own. */
export const nameOf = ({ title }) => (title === null ? t("history_unreadable") : title || t("history_untitled"));

/** The element of one conversation; `actions` as `actionsOf` makes them. */
export function drawRow(one, chat, actions) {
  const damaged = one.title === null;
  const name = nameOf(one);
  const words = h(
    "span",
    { class: "history-words" },
    h("span", { class: "history-title" }, name),
    h("time", { datetime: new Date(one.updated * 1000).toISOString() }, shortly(one.updated)),
  );
  const inside = [thumbnail(one), words];
  const about = `${name}\n${moment(one.updated)}`;
  const opener = damaged
    ? h("div", { class: "history-link", title: "history_damaged" }, inside)
    : h("a", { class: "history-link", href: link(chat.mode, one.id) }, inside);
  if (!damaged) opener.title = about;
  const more = iconButton("more", ["history_menu", { title: name }], () => openMenu(more, actions.items), {
    class: "history-more",
    "aria-haspopup": "menu",
  });
  const element = h("li", { class: `history-row${damaged ? " damaged" : ""}`, dataset: { id: one.id } }, opener, more);
  element.addEventListener("keydown", (event) => {
    if (!event.target.matches(".history-link, .history-more")) return;
    const run = { F2: actions.rename, Delete: actions.remove }[event.key];
    if (!run) return;
    event.preventDefault();
    run();
  });
  element.addEventListener("contextmenu", (event) => {
    if (event.target.closest(".history-name")) return;
    event.preventDefault();
    openMenu(more, actions.items);
  });
  return element;
}

/** The picture of a conversation, fetched when it is first seen. */
function thumbnail({ id, thumbnail: name, title }) {
  const place = h("span", { class: "history-thumb" }, icon(title === null ? "warning" : "chat"));
  if (name) {
    const observer = new IntersectionObserver(async ([entry]) => {
      if (!entry.isIntersecting) return;
      observer.disconnect();
      try {
        place.replaceChildren(h("img", { src: await objectUrl(`conversations/${id}/pictures/${name}`), alt: "" }));
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        place.replaceChildren(icon("pictures")); // it was deleted in another window
      }
    });
    observer.observe(place);
  }
  return place;
}

/**
 * What can be done with a conversation: `items` of a menu, and `rename` and `remove` for the keyboard.
 * `element` gives its row, `refresh` asks for the list again.
 */
export function actionsOf(one, chat, element, refresh) {
  const damaged = one.title === null;

  async function set(fields) {
    try {
      const changed = await change(one.id, fields);
      if (chat.id === one.id && !chat.busy) chat.take(changed);
    } catch (error) {
      tell(error);
    }
    await refresh();
  }

  async function remove() {
    const wasOpen = chat.id === one.id;
    const mode = chat.mode;
    const next = element()?.nextElementSibling ?? element()?.previousElementSibling;
    try {
      await erase(one.id);
    } catch (error) {
      return tell(error);
    }
    if (wasOpen) go(mode, "", { replace: true });
    await refresh();
    (next?.isConnected ? next.querySelector("a, button") : document.querySelector(".history-new"))?.focus();
    toast(t("history_deleted", { title: nameOf(one) }), {
      action: { text: "undo", run: () => undo(wasOpen, mode) },
    });
  }

  async function undo(wasOpen, mode) {
    try {
      await restore(one.id);
      if (wasOpen) go(mode, one.id);
    } catch (error) {
      tell(error);
    }
    await refresh();
  }

  const save = (form) => exported(one.id, nameOf(one), form).catch(tell);
  const rename = () => !damaged && nameInPlace(element(), one, (title) => set({ title }));
  const items = [
    !damaged && { text: "history_rename", drawing: "edit", run: rename },
    !damaged && {
      text: one.pinned ? "history_unpin" : "history_pin",
      drawing: "pin",
      run: () => set({ pinned: !one.pinned }),
    },
    !damaged && { text: "history_markdown", drawing: "download", run: () => save("markdown") },
    !damaged && { text: "history_json", drawing: "download", run: () => save("json") },
    { text: "history_delete", drawing: "remove", run: remove, danger: true },
  ];
  return { items, rename, remove };
}

/** Put a field in the place of a title. Enter and leaving it keep what was typed, Escape does not. */
function nameInPlace(element, one, keep) {
  const title = element?.querySelector(".history-title");
  if (!title || element.querySelector(".history-name")) return;
  const field = h("input", { class: "history-name", label: "history_new_name", value: nameOf(one), maxlength: 120 });
  const opener = element.querySelector(".history-link");
  let done = false;
  const leave = (keeps) => {
    if (done) return;
    done = true;
    const typed = field.value.trim();
    field.remove();
    opener.hidden = false;
    opener.focus();
    if (keeps && typed !== nameOf(one)) keep(typed); // without a name it goes by its first question again
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter that ends the typing of a Chinese word
    if (event.key === "Enter") leave(true);
    else if (event.key === "Escape") leave(false);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  field.addEventListener("blur", () => leave(true));
  opener.hidden = true;
  opener.before(field);
  field.focus();
  field.select();
}
