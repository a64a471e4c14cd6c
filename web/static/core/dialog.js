// Windows in the page: a dialog, a menu, a picture in full size. The browser's own <dialog> keeps the
// keyboard inside and gives it back.

import { objectUrl } from "./api.js";
import { fill, h, icon, iconButton } from "./dom.js";

/** Open a dialog with a heading (a key of web/texts) and a body; returns what closes it. */
export function openDialog(heading, body, { class: also = "", onClose = () => {} } = {}) {
  const dialog = h(
    "dialog",
    { class: `dialog ${also}`, label: heading },
    h("header", {}, h("h2", { say: heading }), iconButton("close", "close", () => dialog.close())),
    h("div", { class: "dialog-body" }, body),
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    onClose();
  });
  document.body.append(dialog);
  dialog.showModal();
  return () => dialog.close();
}

/**
 * Open a menu at an element: `items` are {text: key, drawing, run, danger} or null for those that
 * are left out. Arrow keys move, Escape closes, focus goes back.
 */
export function openMenu(anchor, items) {
  document.querySelector(".menu")?.remove();
  const menu = h("div", { class: "menu", role: "menu" });
  const close = (focus = true) => {
    menu.remove();
    document.removeEventListener("pointerdown", outside, true);
    if (focus) anchor.focus();
  };
  const outside = (event) => !menu.contains(event.target) && close(false);
  fill(
    menu,
    items.filter(Boolean).map(({ text, drawing, run, danger }) =>
      h(
        "button",
        {
          type: "button",
          role: "menuitem",
          class: danger ? "danger" : "",
          onclick: () => {
            close();
            run();
          },
        },
        drawing && icon(drawing),
        h("span", { say: text }),
      ),
    ),
  );
  menu.addEventListener("keydown", (event) => {
    const buttons = [...menu.children];
    const at = buttons.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) buttons[(at + step + buttons.length) % buttons.length].focus();
    else if (event.key === "Escape" || event.key === "Tab") close();
    else return;
    event.preventDefault();
  });
  document.body.append(menu);
  const place = anchor.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(place.right - width, innerWidth - width - 8))}px`;
  menu.style.top = `${place.bottom + height + 8 > innerHeight ? Math.max(8, place.top - height - 4) : place.bottom + 4}px`;
  document.addEventListener("pointerdown", outside, true);
  menu.firstChild?.focus();
}

/** Show pictures as large as the window lets them: paths below /app/, or URLs that begin "blob:". */
export function openLightbox(paths, index = 0) {
  const picture = h("img", { alt: "" });
  const show = async (at) => {
    index = (at + paths.length) % paths.length;
    picture.src = paths[index].startsWith("blob:") ? paths[index] : await objectUrl(paths[index]);
  };
  const many = paths.length > 1;
  const dialog = h(
    "dialog",
    { class: "lightbox", label: "picture_large" },
    picture,
    iconButton("close", "close", () => dialog.close(), { class: "lightbox-close" }),
    many && iconButton("back", "picture_before", () => show(index - 1), { class: "lightbox-back" }),
    many && iconButton("forward", "picture_after", () => show(index + 1), { class: "lightbox-forward" }),
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && many) show(index + step);
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return show(index);
}
