// Pictures as a row of thumbnails: read when they come near the window, shown in full on a click.

import { objectUrl } from "../core/api.js";
import { openLightbox } from "../core/dialog.js";
import { h } from "../core/dom.js";

const NEAR = "800px";
const wanted = new WeakMap(); // image -> its path
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) read(target);
  },
  { rootMargin: NEAR },
);

async function read(image) {
  near.unobserve(image);
  const path = wanted.get(image);
  try {
    image.src = path.startsWith("blob:") ? path : await objectUrl(path);
  } catch (error) {
    image.alt = error.told?.() ?? error.message; // told in its place: the other pictures are there
  }
}

/** A row of thumbnails of pictures: paths below /app/, or blob: URLs. */
export class Thumbnails {
  constructor() {
    this.paths = [];
    this.element = h("div", { class: "thumbnails", hidden: true });
  }

  /** Show these; `isSame` when they are the ones shown, which the server has under other names now. */
  show(paths, isSame = false) {
    if (paths.length === this.paths.length && paths.every((path, index) => path === this.paths[index])) return;
    const isKept = isSame && paths.length === this.paths.length;
    this.paths = paths;
    this.element.hidden = paths.length === 0;
    this.element.dataset.count = paths.length;
    if (isKept) return;
    this.element.replaceChildren(...paths.map((path, index) => this.#thumbnail(path, index)));
  }

  #thumbnail(path, index) {
    const image = h("img", { alt: "" });
    wanted.set(image, path);
    near.observe(image);
    const label = ["picture_shown", { number: index + 1, count: this.paths.length }];
    return h(
      "button",
      { type: "button", class: "thumbnail", label, title: "picture_large", onclick: () => openLightbox(this.paths, index) },
      image,
    );
  }
}
