// SVG elements, and a picture of a chart as a file.

import { save } from "../core/api.js";

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes and children. */
export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const text = (x, y, content, more = {}) =>
  s("text", { x, y, "font-size": 12, "font-family": "system-ui, sans-serif", fill: "var(--muted)", ...more }, content);
export { text as svgText };

/**
 * Save what an SVG shows as a PNG of twice its size, with a title and the names of its series above.
 * `legend`: [{label, colour}].
 */
export async function savePng(svg, { title, legend, name }) {
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  const HEAD = 54;
  let x = 16;
  const names = legend.map(({ label, colour }) => {
    const part = s("g", {}, s("rect", { x, y: 36, width: 14, height: 3, fill: colour }), text(x + 20, 42, label));
    x += 36 + label.length * 6.6;
    return part;
  });
  const inner = svg.cloneNode(true);
  for (const [key, value] of Object.entries({ x: 0, y: HEAD, width, height })) inner.setAttribute(key, value);
  const whole = s(
    "svg",
    { xmlns: SVG, width, height: height + HEAD },
    s("rect", { width, height: height + HEAD, fill: "var(--surface)" }),
    text(16, 24, title, { "font-size": 15, "font-weight": 600, fill: "var(--ink)" }),
    names,
    inner,
  );
  // A picture stands for itself: the colours of the page's styles are written into it.
  const styles = getComputedStyle(svg);
  const source = new XMLSerializer()
    .serializeToString(whole)
    .replace(/var\((--[\w-]+)\)/g, (_, colour) => styles.getPropertyValue(colour).trim());
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: width * 2, height: (height + HEAD) * 2 });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const file = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  save(file, name);
}
