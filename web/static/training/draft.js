// A training as it is being put together: what was chosen, and what the server says of it.

import { get, post } from "../core/api.js";

const PAUSE = 250; // milliseconds after the last change
let fields = null; // of /app/trainings/fields, which do not change while a server runs
let draft = null;

/** The draft of this visit: what was entered is there again when the window is opened again. */
export async function theDraft() {
  fields ??= await get("trainings/fields");
  draft ??= new Draft(fields);
  return draft;
}

/** The next one begins with nothing of the last one. */
export function endDraft() {
  draft = null;
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

export class Draft {
  #listeners = new Set();
  #timer = 0;
  #asked = 0;

  constructor(told) {
    this.fields = told.fields;
    this.groups = told.groups;
    this.presets = new Map(told.presets.map(({ name, values }) => [name, values]));
    Object.assign(this, { preset: told.preset, values: {}, name: "", startFrom: "", command: "", problems: [] });
    this.checked = null; // the key of the data that were looked through
    this.settled = false; // whether the server has told of what is shown
  }

  value(name) {
    return name in this.values ? this.values[name] : this.usual(name);
  }

  /** What the preset says. */
  usual(name) {
    return this.presets.get(this.preset)[name];
  }

  isChanged(name) {
    return name in this.values;
  }

  set(name, value) {
    if (same(value, this.usual(name))) delete this.values[name];
    else this.values[name] = value;
    this.change(name);
  }

  choose(preset, values = {}, startFrom = "") {
    Object.assign(this, { preset, values: { ...values }, startFrom });
    this.change("preset");
  }

  rename(name) {
    this.name = name;
    this.change("name");
  }

  get body() {
    return { name: this.name, preset: this.preset, values: this.values, start_from: this.startFrom };
  }

  /** What a check of the data depends on. */
  get dataKey() {
    const read = ["data", "images", "base", "vision", "vision_features", "max_text_tokens", "row_tokens", "feature_pooling", "projector", "projector_queries"];
    return JSON.stringify(read.map((name) => this.value(name)));
  }

  get isChecked() {
    return this.checked === this.dataKey;
  }

  problemOf(name) {
    return this.problems.find(({ field }) => field === name);
  }

  /** Call `listener` with the name of what has changed, or "told" when the server has answered. */
  on(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  change(what) {
    this.settled = false;
    this.#tell(what);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.ask(), PAUSE);
  }

  #tell(what) {
    for (const listener of this.#listeners) listener(what);
  }

  /** Have the server say which command line this is, and what is wrong with it. */
  async ask() {
    clearTimeout(this.#timer);
    const mine = ++this.#asked;
    let told;
    try {
      told = await post("trainings/command", this.body);
    } catch (error) {
      told = { command: this.command, problems: [{ field: null, text: error.told?.() ?? error.message, key: null }] };
    }
    if (mine !== this.#asked) return;
    Object.assign(this, told, { settled: true });
    this.#tell("told");
  }
}
