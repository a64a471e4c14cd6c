// The conversations in the sidebar: begun, found, opened, and by a menu of each named, pinned, saved, deleted.

import { ApiError } from "../core/api.js";
import { fill, h, icon } from "../core/dom.js";
import { link } from "../core/router.js";
import { onLanguage, t } from "../core/texts.js";
import { listed } from "./conversations.js";
import { groupOf } from "./dates.js";
import { actionsOf, drawRow } from "./rows.js";

const TYPING = 200; // milliseconds of silence after which what was typed is searched for
const SOON = 50; // several reasons to ask again come at once: a window that is shown also gets the focus

export function mountHistory(side, chat) {
  const rows = new Map(); // id -> {drawn: its JSON, element}; a row that is as it was keeps its element
  let all = [];
  let asked = 0;
  let timer = null;
  const begin = h(
    "a",
    { class: "button history-new", href: link("chat"), onclick: begun },
    icon("add"),
    h("span", { say: "new_conversation" }),
  );
  const search = h("input", { type: "search", label: "history_search", placeholder: "history_search", maxlength: 200 });
  const note = h("p", { class: "history-note hint", role: "status", hidden: true });
  const list = h("div", { class: "history-list" });
  const nav = h("div", { class: "history", role: "navigation", label: "conversations" }, list);
  side.append(begin, h("label", { class: "history-search" }, icon("search"), search), note, nav);

  /** Also in the voice room: its link without a conversation goes on with the one that is open. */
  function begun(event) {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // in a tab of its own
    event.preventDefault();
    leaveMenu();
    chat.open("");
  }

  async function refresh() {
    clearTimeout(timer);
    const turn = ++asked;
    try {
      const found = await listed(search.value.trim());
      if (turn !== asked) return;
      all = found;
      say(all.length ? "" : t(search.value.trim() ? "history_none_found" : "history_none"));
      draw();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (turn === asked) say(error.told());
    }
  }

  function say(text) {
    note.textContent = text;
    note.hidden = !text;
  }

  const later = (wait) => {
    clearTimeout(timer);
    timer = setTimeout(refresh, wait);
  };

  /** Show the list, without taking the keyboard from whoever is in it. */
  function draw() {
    if (list.querySelector(".history-name")) return later(1000); // a name is being typed
    const [focused, scrolled] = [document.activeElement, nav.scrollTop];
    const [focusedId, focusedClass] = [focused?.closest?.(".history-row")?.dataset.id, focused?.className];
    const groups = new Map();
    for (const one of all) {
      const group = groupOf(one);
      groups.set(group, [...(groups.get(group) ?? []), row(one)]);
    }
    for (const id of [...rows.keys()]) if (!all.some((one) => one.id === id)) rows.delete(id);
    fill(
      list,
      [...groups].map(([name, elements]) =>
        h("section", { "aria-label": name }, h("h3", {}, name), h("ul", { role: "list" }, elements)),
      ),
    );
    nav.scrollTop = scrolled;
    mark();
    if (focusedId && document.activeElement !== focused) {
      const again = rows.get(focusedId)?.element;
      const same = [...(again?.querySelectorAll("a, button") ?? [])].find((one) => one.className === focusedClass);
      (same ?? again?.querySelector("a") ?? search).focus({ preventScroll: true });
    }
  }

  function row(one) {
    const drawn = JSON.stringify(one);
    if (rows.get(one.id)?.drawn !== drawn) {
      rows.set(one.id, { drawn, element: drawRow(one, chat, actionsOf(one, chat, () => rows.get(one.id)?.element, refresh)) });
    }
    return rows.get(one.id).element;
  }

  /** Mark the conversation that is open, and link to the others in the way that it is held. */
  function mark() {
    begin.href = link(chat.mode);
    for (const [id, { element }] of rows) {
      const anchor = element.querySelector("a");
      element.classList.toggle("current", id === chat.id);
      if (!anchor) continue;
      anchor.href = link(chat.mode, id);
      if (id === chat.id) anchor.setAttribute("aria-current", "page");
      else anchor.removeAttribute("aria-current");
    }
  }

  list.addEventListener("keydown", (event) => {
    if (!event.target.matches("a")) return;
    const anchors = [...list.querySelectorAll("a")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    anchors[anchors.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  });
  list.addEventListener("click", (event) => event.target.closest("a[aria-current]") && leaveMenu());
  search.addEventListener("input", () => later(TYPING));
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") list.querySelector("a")?.focus();
    else if (event.key === "Escape" && search.value) {
      search.value = "";
      refresh();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  chat.on((kind) => {
    if (kind === "listed") later(SOON);
    else if (kind === "opened" || kind === "changed") mark();
    if (kind === "opened" && chat.id && !all.some((one) => one.id === chat.id)) later(SOON); // of another window
  });
  addEventListener("focus", () => later(SOON));
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && later(SOON));
  onLanguage(() => {
    rows.clear(); // they hold dates
    refresh();
  });
  return refresh();
}

/** On a telephone the sidebar lies over the room: away with it, also where the address stays. */
function leaveMenu() {
  document.querySelector(".page")?.classList.remove("open");
}

