// The alignment meter: how often the model is right with the right picture, another one, and a blank
// one. Their distance says whether it looks at the picture.

import { fill, h } from "../core/dom.js";
import { number, say } from "../core/texts.js";

const SHARES = ["right", "swapped", "blank"];
const LOOKS = 20; // points apart: it answers by the picture
const BEGINS = 5; // below that, chance can make the distance

export class Meter {
  constructor() {
    this.figure = h("strong", { class: "meter-figure" });
    this.unit = h("span", { class: "meter-unit" });
    this.meaning = h("p", { class: "meter-meaning" });
    this.bars = h("div", { class: "meter-bars" });
    this.at = h("p", { class: "hint" });
    this.none = h("p", { class: "hint", say: "not_evaluated_yet" });
    const head = h("div", { class: "meter-head" }, this.figure, this.unit);
    this.whole = h("div", {}, head, this.meaning, this.bars, this.at);
    this.element = h("section", { class: "card meter" }, h("h2", { say: "alignment" }), this.whole, this.none);
    this.update(null);
  }

  /** Show {step, right, swapped, blank} of an evaluation, or that there is none. */
  update(found) {
    this.whole.hidden = !found;
    this.none.hidden = Boolean(found);
    if (!found) return;
    const gap = found.right - found.swapped;
    this.figure.textContent = number(gap, 1);
    say(this.unit, { content: "points_apart" });
    const key = gap >= LOOKS ? "meter_looks" : gap >= BEGINS ? "meter_begins" : "meter_ignores";
    const values = { right: number(found.right, 0), swapped: number(found.swapped, 0) };
    say(this.meaning, { content: [key, values] });
    say(this.at, { content: ["meter_at", { step: number(found.step) }] });
    fill(
      this.bars,
      SHARES.map((name) =>
        h(
          "div",
          { class: `meter-bar ${name}` },
          h("span", { say: name }),
          h("div", { class: "meter-track" }, h("div", { style: { width: `${Math.max(0, Math.min(100, found[name]))}%` } })),
          h("b", {}, `${number(found[name], 1)} %`),
        ),
      ),
    );
  }
}
