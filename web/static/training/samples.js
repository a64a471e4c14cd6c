// What the model answered to the same few questions at every evaluation.

import { get, objectUrl } from "../core/api.js";
import { openLightbox } from "../core/dialog.js";
import { fill, h, icon, iconButton } from "../core/dom.js";
import { number, say } from "../core/texts.js";
import { pathOf } from "./series.js";

export class Samples {
  #known = [];
  #asked = ""; // what was known of the log when it was last asked for
  #at = -1; // the evaluation that is shown; -1: the newest, also when there is a newer one
  #missing = new Set(); // pictures that cannot be had

  constructor(run) {
    this.run = run;
    const slide = () => this.#choose(Number(this.slider.value));
    this.slider = h("input", { type: "range", min: 0, step: 1, label: "evaluation_shown", oninput: slide });
    this.step = h("output", {});
    this.before = iconButton("back", "evaluation_before", () => this.#choose(this.#index() - 1));
    this.after = iconButton("forward", "evaluation_after", () => this.#choose(this.#index() + 1));
    this.score = h("span", { class: "pill" });
    this.tools = h("div", { class: "samples-tools" }, this.before, this.slider, this.after, this.step);
    this.cards = h("ol", { class: "samples" });
    this.none = h("p", { class: "hint", say: "no_samples" });
    this.element = h(
      "section",
      { class: "card samples-card" },
      h("header", { class: "section-head" }, h("h2", {}, h("span", { say: "samples" }), this.score), this.tools),
      this.cards,
      this.none,
    );
    this.draw();
  }

  /** `told`: the dashboard; the samples are asked for when there are more of them. */
  async update({ evaluations, version }) {
    const now = `${version}:${evaluations}`;
    if (now === this.#asked) return;
    this.#asked = now;
    this.#known = evaluations ? (await get(pathOf(this.run, "/samples"))).evaluations : [];
    this.draw();
  }

  #index() {
    const last = this.#known.length - 1;
    return this.#at < 0 ? last : Math.min(this.#at, last);
  }

  #choose(index) {
    const last = this.#known.length - 1;
    this.#at = index >= last ? -1 : Math.max(0, index);
    this.draw();
  }

  draw() {
    const count = this.#known.length;
    const index = this.#index();
    this.tools.hidden = count < 2;
    this.cards.hidden = this.score.hidden = !count;
    this.none.hidden = count > 0;
    if (!count) return;
    const { step, samples } = this.#known[index];
    this.slider.max = count - 1;
    this.slider.value = index;
    this.before.disabled = index === 0;
    this.after.disabled = index === count - 1;
    say(this.step, { content: ["step_of", { step: number(step) }] });
    this.slider.setAttribute("aria-valuetext", this.step.textContent);
    say(this.score, { content: ["right_of", { right: samples.filter(({ right }) => right).length, all: samples.length }] });
    fill(this.cards, samples.map((sample) => this.#card(sample)));
  }

  #card({ question, answer, right_answer: expected, right, picture, shown }) {
    return h(
      "li",
      { class: `sample ${right ? "is-right" : "is-wrong"}` },
      this.#picture(picture, shown),
      h(
        "div",
        { class: "sample-words" },
        h("p", { class: "sample-question" }, question),
        h(
          "p",
          { class: "sample-answer" },
          icon(right ? "check" : "close"),
          h("span", { class: "visually-hidden", say: right ? "answered_right" : "answered_wrong" }),
          h("span", {}, answer || "—"),
        ),
        !right && h("p", { class: "sample-expected" }, h("span", { say: "right_answer" }), " ", h("b", {}, expected)),
      ),
    );
  }

  #picture(name, isThere) {
    const path = pathOf(this.run, `/pictures/${name.split("/").map(encodeURIComponent).join("/")}`);
    if (!isThere || this.#missing.has(path)) return h("div", { class: "sample-picture named" }, name || "—");
    const image = h("img", { alt: "", width: 84, height: 84 });
    const place = h(
      "button",
      { type: "button", class: "sample-picture", label: ["show_picture", { name }], onclick: () => openLightbox([path]) },
      image,
    );
    objectUrl(path).then(
      (url) => (image.src = url),
      () => {
        this.#missing.add(path); // it is not where the run found it: its name is told
        place.replaceWith(h("div", { class: "sample-picture named" }, name));
      },
    );
    return place;
  }
}
