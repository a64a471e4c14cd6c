// What is trained: the recipe, the base and the encoder, and the weights to begin with.

import { get } from "../core/api.js";
import { h } from "../core/dom.js";
import { tell } from "../core/toast.js";
import { labelled, saying, textInput } from "./parts.js";

const PRESETS = {
  tiny: ["train_preset_tiny", "train_preset_tiny_about"],
  phi35: ["train_preset_full", "train_preset_full_about"],
};

export class ModelChoice {
  constructor(draft, names) {
    this.draft = draft;
    const order = [...draft.presets.keys()].sort((one, other) => Number(other === draft.preset) - Number(one === draft.preset));
    this.radios = order.map((name) => this.#preset(name));
    const offered = names.map((name) => h("option", { value: name }, name));
    const begin = () => this.#begin(from.value).catch(tell);
    const from = h("select", { onchange: begin }, h("option", { value: "", say: "train_from_base" }), offered);
    this.from = { control: from, ...labelled(saying("train_from"), from, "train_from_about") };
    this.places = [this.#place("base", "train_base"), this.#place("vision", "train_encoder")];
    this.element = h(
      "div",
      { class: "begin-model" },
      h("fieldset", { class: "begin-presets" }, h("legend", { say: "train_preset" }), this.radios.map(({ element }) => element)),
      h("div", { class: "begin-grid" }, this.places.map(({ element }) => element)),
      this.from.element,
    );
  }

  #preset(name) {
    const [title, about] = PRESETS[name] ?? [null, "train_preset_other_about"];
    const control = h("input", { type: "radio", name: "begin-preset", value: name, onchange: () => this.draft.choose(name) });
    const element = h(
      "label",
      { class: "begin-preset" },
      control,
      h("span", {}, title ? h("b", { say: title }) : h("b", {}, name), h("small", { say: about })),
    );
    return { element, control, name };
  }

  #place(name, label) {
    const control = textInput(() => this.draft.set(name, control.value.trim()));
    return { name, control, ...labelled(saying(label), control, "train_place_about") };
  }

  /** Take a run's recipe over with its weights, or leave both. */
  async #begin(name) {
    if (!name) {
      this.draft.choose(this.draft.preset, this.draft.values, "");
      return;
    }
    try {
      const { preset, values } = await get(`trainings/recipes/${encodeURIComponent(name)}`);
      this.draft.choose(preset, values, name);
    } catch (error) {
      this.update();
      throw error;
    }
  }

  update() {
    const { draft } = this;
    for (const { control, name } of this.radios) control.checked = name === draft.preset;
    for (const { control, name, refuse } of this.places) {
      if (control.value.trim() !== draft.value(name)) control.value = draft.value(name);
      refuse(draft.problemOf(name));
    }
    this.from.control.value = draft.startFrom;
    this.from.refuse(draft.problemOf("start_from"));
  }
}
