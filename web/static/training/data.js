// What a run learns from: how much, and which records could not be used.

import { fill, h } from "../core/dom.js";
import { number, say } from "../core/texts.js";

// The counts of a checkpoint, by the names of their texts.
const COUNTS = {
  training_conversations: "count_training",
  validation_conversations: "count_validation",
  pictures: "count_pictures",
  tokens: "count_tokens",
  alignment_questions: "count_alignment",
  quarantined: "count_quarantined",
  shortened: "count_shortened",
};

export class DataCounts {
  #drawn = "";

  constructor() {
    this.counts = h("dl", { class: "counts" });
    this.none = h("p", { class: "hint", say: "counts_later" });
    this.quarantine = h("div", { class: "quarantine" });
    this.element = h("section", { class: "card data" }, h("h2", { say: "data" }), this.counts, this.none, this.quarantine);
  }

  /** `told`: the dashboard. */
  update({ data }) {
    const now = JSON.stringify(data);
    if (now === this.#drawn) return;
    this.#drawn = now;
    const known = Object.entries(COUNTS).filter(([name]) => name in data.counts);
    this.none.hidden = known.length > 0;
    fill(this.counts, known.map(([name, key]) => h("div", {}, h("dt", { say: key }), h("dd", {}, number(data.counts[name])))));
    const { quarantine } = data;
    if (!quarantine) return void fill(this.quarantine);
    const title = h("h3", {});
    say(title, { content: [quarantine.whole ? "set_aside" : "set_aside_more", { count: number(quarantine.count) }] });
    const nothing = h("p", { class: "hint", say: "nothing_set_aside" });
    fill(this.quarantine, ...(quarantine.count ? [title, ...quarantine.reasons.map(reason)] : [nothing]));
  }
}

function reason({ reason: text, count, examples }) {
  return h(
    "details",
    { class: "reason" },
    h("summary", {}, h("b", {}, number(count)), h("span", {}, text)),
    h("ul", {}, examples.map(example)),
  );
}

const example = ({ where, id, reason: whole }) =>
  h("li", {}, h("code", {}, [where, id].filter(Boolean).join(" · ")), " ", whole);
