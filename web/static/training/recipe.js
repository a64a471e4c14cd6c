// Every field of a run's config, with its help, and what differs from the preset.

import { fill, h } from "../core/dom.js";
import { say } from "../core/texts.js";

export class Recipe {
  #drawn = "";
  #onlyDiffering = null; // until somebody chooses: true where something differs

  constructor() {
    this.body = h("div", { class: "recipe-groups" });
    this.note = h("p", { class: "hint" });
    this.only = h("input", {
      type: "checkbox",
      onchange: (event) => {
        this.#onlyDiffering = event.target.checked;
        this.#show();
      },
    });
    this.choice = h("label", { class: "tool" }, this.only, h("span", { say: "only_differing" }));
    this.element = h(
      "section",
      { class: "card recipe" },
      h("header", { class: "section-head" }, h("h2", { say: "recipe" }), this.choice),
      this.note,
      this.body,
    );
  }

  /** `told`: the dashboard. */
  update({ recipe, recipe_error: error }) {
    const now = JSON.stringify([recipe, error]);
    if (now === this.#drawn) return;
    this.#drawn = now;
    this.recipe = recipe;
    this.choice.hidden = this.body.hidden = !recipe;
    if (recipe) say(this.note, { content: ["recipe_of", { checkpoint: recipe.checkpoint, preset: recipe.preset }] });
    else if (error) fill(this.note, error);
    else say(this.note, { content: "recipe_not_saved" });
    this.#show();
  }

  #show() {
    if (!this.recipe) return;
    const only = this.#onlyDiffering ?? this.recipe.fields.some(({ differs }) => differs);
    this.only.checked = only;
    const shown = this.recipe.fields.filter(({ differs }) => differs || !only);
    const groups = [...new Set(shown.map(({ group }) => group))];
    fill(
      this.body,
      groups.map((group) => {
        const fields = shown.filter((one) => one.group === group);
        return h("section", {}, h("h3", { say: group }), h("dl", {}, fields.map(row)));
      }),
      !groups.length && h("p", { class: "hint", say: "nothing_differs" }),
    );
  }
}

function row({ name, value, default: usual, differs, help }) {
  return h(
    "div",
    { class: differs ? "differs" : "" },
    h("dt", {}, h("code", {}, name), h("small", {}, help)),
    h("dd", {}, h("span", {}, value || "—"), differs && h("small", { say: ["preset_has", { value: usual || "—" }] })),
  );
}
