// The page: its frame, and the room that the address names. A room is loaded when it is first opened.

import { h, icon, iconButton } from "./core/dom.js";
import { site, start } from "./core/model.js";
import { link, onRoute, route } from "./core/router.js";
import { language, onLanguage, rememberedLanguage, setLanguage, t } from "./core/texts.js";
import { applyTheme } from "./core/theme.js";
import * as chat from "./chat/room.js";
import { settingsButton } from "./chat/settings.js";

const ROOMS = {
  chat: { drawing: "chat", load: async () => chat },
  voice: { drawing: "voice", load: async () => chat }, // the chat, asked and answered aloud
  batch: { drawing: "pictures", load: () => import("./batch/room.js") },
  training: { drawing: "curves", load: () => import("./training/room.js") },
};
const LOADED_LATER = 1500; // milliseconds after the first room
const begun = begin(); // while Gradio is being loaded
applyTheme();

async function begin() {
  const told = await start();
  const wanted = rememberedLanguage();
  await setLanguage(wanted in told.languages ? wanted : told.language);
  return told;
}

/** Show the page in an element; called by Gradio when the element is there. */
export async function mount(root) {
  const told = await begun;
  document.documentElement.lang = language(); // Gradio has set the browser's meanwhile
  const page = root.querySelector("#phisight") ?? root;
  leaveGradiosRules(page);
  const aside = h("div", { class: "sidebar-room" });
  const main = h("main", { class: "rooms", tabindex: "-1" });
  const sidebar = h("aside", { class: "sidebar", id: "sidebar" }, brand(told), navigation(told), aside, settingsButton());
  const skip = h("button", { type: "button", class: "button skip", say: "to_the_content", onclick: () => main.focus() });
  page.classList.add("page");
  const closeDrawer = makeDrawer(page, sidebar, main, skip);
  const mounted = new Map();
  let [opening, there] = [0, location.hash];

  async function open({ room, argument }) {
    const name = room in ROOMS && !(room === "training" && site().can.training === "none") ? room : "chat";
    const { load } = ROOMS[name];
    const asked = ++opening;
    const loaded = await loadRoom(load);
    if (asked !== opening) return; // another room was asked for while this one was being loaded
    if (!loaded) return history.replaceState(null, "", there || link("chat")); // the room that is shown stays
    there = location.hash;
    if (!mounted.has(loaded)) {
      const element = h("section", { class: `room ${name === "voice" ? "chat" : name}-room` });
      const side = h("div", { class: "side" });
      main.append(element);
      aside.append(side);
      mounted.set(loaded, { element, side, shown: loaded.mount(element, { side, site }) });
    }
    for (const [one, { element, side, shown }] of mounted) {
      const isOpen = one === loaded;
      if (!isOpen && !element.hidden) shown.hide?.();
      element.hidden = side.hidden = !isOpen;
    }
    closeDrawer();
    page.dataset.room = name;
    for (const one of sidebar.querySelectorAll("nav a")) {
      if (one.dataset.room === name) one.setAttribute("aria-current", "page");
      else one.removeAttribute("aria-current");
    }
    document.title = name === "chat" ? "PhiSight" : `${t(name)} · PhiSight`;
    mounted.get(loaded).shown.show?.(argument, name);
  }

  onRoute(open);
  onLanguage(() => open(route()));
  await open(route());
  page.dataset.ready = "true";
  loadLater(told);
}

/** The module of a room; null where it did not come, which is told. A browser asks for a module only once a visit. */
async function loadRoom(load) {
  try {
    return await load();
  } catch (error) {
    console.debug("a room was not loaded:", error.message);
    const { toast } = await import("./core/toast.js");
    toast(t("room_not_loaded"), { kind: "error", action: { text: "load_again", run: () => location.reload() } });
    return null;
  }
}

/** Load the other rooms when the first one has long been there: they then open at once, and without a server too. */
function loadLater(told) {
  const others = [ROOMS.batch, told.can.training !== "none" && ROOMS.training].filter(Boolean);
  const load = () => others.forEach((room) => room.load().catch((error) => console.debug("not yet loaded:", error.message)));
  setTimeout(() => (window.requestIdleCallback ?? setTimeout)(load), LOADED_LATER);
}

/**
 * Put the page together. On a narrow window the sidebar is a drawer: open, it alone has the keyboard; closed, the
 * keyboard goes back to what opened it, or to the room that was chosen in it. Returns what closes it.
 */
function makeDrawer(page, sidebar, main, skip) {
  const opener = iconButton("menu", "open_menu", () => set(true), {
    class: "sidebar-opener",
    "aria-controls": "sidebar",
    "aria-expanded": "false",
  });
  const veil = h("div", { class: "veil", onclick: () => set(false, opener) });
  const isOpen = () => page.classList.contains("open");

  function set(open, focused = main) {
    if (open === isOpen()) return;
    const hadFocus = sidebar.contains(document.activeElement) || document.activeElement === document.body;
    page.classList.toggle("open", open);
    opener.setAttribute("aria-expanded", String(open));
    for (const behind of [main, opener, skip]) behind.inert = open;
    if (open) (sidebar.querySelector("[aria-current='page']") ?? sidebar.querySelector("a")).focus();
    else if (hadFocus) focused.focus({ preventScroll: true });
  }

  page.replaceChildren(skip, opener, sidebar, veil, main);
  sidebar.addEventListener("click", (event) => event.target.closest("a") && set(false)); // also one that leads to where one is
  addEventListener("keydown", (event) => {
    const isOurs = event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]");
    if (isOurs) set(false, opener);
  });
  matchMedia("(max-width: 860px)").addEventListener("change", () => set(false));
  return () => set(false);
}

/** Gradio's rules for plain buttons, headings and fields hang on a class of its container, and outrank those of base.css. */
function leaveGradiosRules(page) {
  const container = page.closest(".gradio-container");
  const scopes = [...(container?.classList ?? [])].filter((name) => name.startsWith("gradio-container-"));
  container?.classList.remove(...scopes);
  page.parentElement?.closest("main")?.setAttribute("role", "presentation"); // a page has one <main>, and ours is it
}

function brand(told) {
  const tagline = told.can.public ? "tagline_public" : "tagline";
  return h("header", { class: "brand" }, h("a", { href: link("chat") }, "PhiSight"), h("p", { id: "tagline", say: tagline }));
}

function navigation(told) {
  const current = route().room;
  return h(
    "nav",
    { label: "rooms" },
    Object.entries(ROOMS)
      .filter(([name]) => name !== "training" || told.can.training !== "none")
      .map(([name, { drawing }]) =>
        h(
          "a",
          { href: link(name), dataset: { room: name }, "aria-current": name === current ? "page" : null },
          icon(drawing),
          h("span", { say: name }),
        ),
      ),
  );
}
