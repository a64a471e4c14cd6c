// The fields of the config: those that are changed most, and the rest, folded and searchable. Names and
// helps are those of the config itself.

import { fill, h, iconButton } from "../core/dom.js";
import { say } from "../core/texts.js";
import { labelled } from "./parts.js";

const GROUPS = {
  model: "train_group_model",
  listening: "train_group_listening",
  data: "train_group_data",
  optimisation: "train_group_optimisation",
  records: "train_group_records",
  machine: "train_group_machine",
};
const ELSEWHERE = new Set(["data", "images", "base", "vision"]); // they have steps of their own

/** "learning_rate" -> "Learning rate", as people read it. */
const words = (name) => (name[0].toUpperCase() + name.slice(1).replaceAll("_", " ")).replace(/\blora\b/i, "LoRA");

export class Fields {
  constructor(draft) {
    this.draft = draft;
    this.rows = draft.fields.filter(({ name }) => !ELSEWHERE.has(name)).map((field) => new FieldRow(field, draft));
    this.search = h("input", { type: "search", placeholder: "train_search", label: "train_search", oninput: () => this.sift() });
    this.changed = h("input", { type: "checkbox", onchange: () => this.sift() });
    this.count = h("span", {});
    this.none = h("p", { class: "hint", say: "train_search_none", hidden: true });
    const common = this.rows.filter(({ field }) => field.common !== null);
    common.sort((one, other) => one.field.common - other.field.common);
    this.parts = [this.#part("common", common, true)];
    for (const group of draft.groups) {
      const rows = this.rows.filter(({ field }) => field.common === null && field.group === group);
      if (rows.length) this.parts.push(this.#part(group, rows, false));
    }
    this.element = h(
      "div",
      { class: "begin-fields" },
      h(
        "div",
        { class: "begin-sift" },
        this.search,
        h("label", { class: "begin-tick" }, this.changed, h("span", { say: "train_changed_only" }), this.count),
      ),
      h("p", { class: "hint", say: "train_help_language" }),
      this.none,
      this.parts.map(({ element }) => element),
    );
    this.update();
  }

  #part(group, rows, open) {
    const key = group === "common" ? "train_group_common" : GROUPS[group];
    const grid = h("div", { class: "begin-grid" }, rows.map(({ element }) => element));
    const count = h("span", { class: "begin-badge", hidden: true });
    const heading = [key ? h("span", { say: key }) : h("span", {}, group), count];
    const element = h("details", { class: "begin-part", open }, h("summary", {}, heading), grid);
    return { element, rows, open, count };
  }

  /** Show what the search finds, and what has been changed where only that is wanted. */
  sift() {
    const wanted = this.search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const sifted = wanted.length > 0 || this.changed.checked;
    let found = 0;
    for (const { element, rows, open } of this.parts) {
      let shown = 0;
      for (const row of rows) {
        const isFound = wanted.every((word) => row.text.includes(word));
        const fits = isFound && (!this.changed.checked || this.draft.isChanged(row.field.name));
        row.element.hidden = !fits;
        shown += fits;
      }
      element.hidden = shown === 0;
      if (sifted !== this.sifted) element.open = sifted || open;
      found += shown;
    }
    this.sifted = sifted;
    this.none.hidden = found > 0;
  }

  update() {
    for (const row of this.rows) row.update();
    for (const { rows, count, element } of this.parts) {
      const changed = rows.filter(({ field }) => this.draft.isChanged(field.name)).length;
      const wrong = rows.some(({ field }) => this.draft.problemOf(field.name));
      count.hidden = !changed;
      say(count, { content: ["train_changed", { count: changed }] });
      if (wrong) element.open = true;
    }
    const total = Object.keys(this.draft.values).filter((name) => !ELSEWHERE.has(name)).length;
    this.count.textContent = total ? ` (${total})` : "";
  }
}

class FieldRow {
  constructor(field, draft) {
    Object.assign(this, { field, draft });
    this.text = `${field.name} ${words(field.name)} ${field.flag} ${field.help}`.toLowerCase();
    this.control = this.#control();
    const reset = () => draft.set(field.name, draft.usual(field.name));
    this.reset = iconButton("again", "train_reset", reset, { class: "begin-reset" });
    const about = { line: field.allowed && !field.choices ? `${field.help} (${field.allowed})` : field.help };
    const label = (id) => h("label", { for: id, title: null }, words(field.name));
    this.labelled = labelled(label, this.control, about, [h("code", { class: "begin-flag" }, field.flag), this.reset]);
    this.element = this.labelled.element;
  }

  #control() {
    const { kind, choices } = this.field;
    const taken = (value) => this.draft.set(this.field.name, value);
    if (kind === "boolean") {
      const answers = [h("option", { value: "true", say: "train_yes" }), h("option", { value: "false", say: "train_no" })];
      return h("select", { onchange: (event) => taken(event.target.value === "true") }, answers);
    }
    if (choices) {
      const offered = choices.map((one) => h("option", { value: one }, one));
      return h("select", { onchange: (event) => taken(event.target.value) }, offered);
    }
    const isNumber = kind === "whole" || kind === "number";
    return h("input", {
      type: "text",
      inputmode: kind === "whole" ? "numeric" : isNumber ? "decimal" : "text",
      autocomplete: "off",
      spellcheck: "false",
      oninput: (event) => taken(this.#read(event.target.value)),
    });
  }

  /** What was typed as the server takes it; what is none of its kind is sent as it is, and refused. */
  #read(text) {
    const { kind } = this.field;
    const trimmed = text.trim();
    if (kind === "names") return trimmed.split(/[,\s]+/).filter(Boolean);
    if (kind === "text") return trimmed;
    const value = Number(trimmed);
    return trimmed !== "" && Number.isFinite(value) ? value : trimmed;
  }

  update() {
    const { field, draft, control } = this;
    const value = draft.value(field.name);
    if (document.activeElement !== control || control.tagName === "SELECT" || !draft.isChanged(field.name)) {
      const shown = Array.isArray(value) ? value.join(", ") : String(value);
      if (JSON.stringify(this.#read(control.value)) !== JSON.stringify(value)) control.value = shown;
    }
    const changed = draft.isChanged(field.name);
    this.element.classList.toggle("changed", changed);
    this.reset.hidden = !changed;
    const usual = draft.usual(field.name);
    const words = ["train_reset", { value: Array.isArray(usual) ? usual.join(", ") : String(usual) }];
    say(this.reset, { title: words, label: words });
    this.labelled.refuse(draft.problemOf(field.name));
  }
}

/** What has been changed, as a list of flags and values. */
export function changedList(draft) {
  const rows = Object.entries(draft.values).map(([name, value]) => {
    const shown = Array.isArray(value) ? value.join(", ") : String(value);
    return [h("dt", {}, words(name)), h("dd", shown ? {} : { say: "train_empty_value" }, shown || null)];
  });
  return fill(h("dl", { class: "begin-changed" }), rows.flat());
}
