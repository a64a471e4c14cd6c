// Elements, made in one way: text is text, never HTML.

import { say } from "./texts.js";
import { SHAPES } from "./icons.js";

/**
 * An element. `given` has its properties: `class`, `dataset` and `style` objects, `on…` listeners,
 * attributes by their name (false and null leave one out); and the texts of web/texts that follow
 * the chosen language: `say` for its content, `title`, `label` (aria-label), `placeholder` for
 * attributes, each a key or [key, values].
 */
export function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  const { say: content, title, label, placeholder, ...others } = given;
  for (const [name, value] of Object.entries(others)) set(element, name, value);
  const said = { content, title, label, placeholder };
  if (Object.values(said).some(Boolean)) say(element, said);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function set(element, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name === "class") element.className = value;
  else if (name === "dataset") Object.assign(element.dataset, value);
  else if (name === "style") Object.assign(element.style, value);
  else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
  else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
  else element.setAttribute(name, value === true ? "" : value);
}

/** Put `children` in the place of what `element` holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A line drawing of `icons.js`, which screen readers pass over: what it means is told by `label`. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  for (const shape of SHAPES[name]) {
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", shape);
    svg.append(path);
  }
  return svg;
}

/** A button that shows an icon alone; `text`, a key of web/texts, is its name and its tooltip. */
export function iconButton(name, text, onclick, more = {}) {
  const { class: also = "", ...others } = more;
  return h("button", { type: "button", class: `icon-button ${also}`, title: text, label: text, onclick, ...others }, icon(name));
}

/** A button with words. `kind`: "primary", "plain" or "danger". */
export function button(text, onclick, { kind = "plain", drawing = null, ...more } = {}) {
  const { class: also = "", ...others } = more;
  return h(
    "button",
    { type: "button", class: `button ${kind} ${also}`, onclick, ...others },
    drawing && icon(drawing),
    h("span", { say: text }),
  );
}
