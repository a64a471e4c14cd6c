// Exports of a run: their forms, how they come along, what their certificates say, and the files.

import { ApiError, get, post, remove, url } from "../core/api.js";
import { openDialog } from "../core/dialog.js";
import { button, fill, h, icon } from "../core/dom.js";
import { number } from "../core/texts.js";
import { tell } from "../core/toast.js";
import { labelled, saying } from "./parts.js";

const NAMES = {
  merge: "export_merge",
  llava: "export_llava",
  requantize: "export_requantize",
  prune: "export_prune",
  gguf: "export_gguf",
  peft: "export_peft",
};
const STATES = {
  running: "export_running",
  done: "export_done",
  failed: "export_failed",
  ended: "export_ended",
};
const SECONDS = 1; // between two looks while an export runs

/** `run`: as in `runActions`; `checkpoint`: the folder's name of the one to begin with. */
export async function openExports(run, checkpoint = "") {
  const list = new ExportList();
  const waiting = [h("span", { class: "begin-spinner" }), h("span", { say: "export_loading" })];
  const place = h("div", {}, h("p", { class: "hint begin-waiting", role: "status" }, waiting));
  const body = h("div", { class: "exports" }, h("p", { class: "hint", say: "export_about" }), place, list.element);
  openDialog("export_title", body, { class: "begin-window exports-window", onClose: () => list.leave() });
  const forms = get("exports/forms");
  await list.refresh();
  fill(place, new ExportForm(run, (await forms).forms, checkpoint, list).element);
}

class ExportForm {
  constructor(run, forms, checkpoint, list) {
    Object.assign(this, { run, forms, list, form: forms[0], values: {} });
    this.radios = forms.map((form) => this.#choice(form));
    const saved = [...run.checkpoints].sort((one, other) => other.step - one.step);
    const options = saved.map(({ name, step, best }, index) => {
      const mark = best ? "export_best" : index === 0 ? "export_newest" : null;
      const words = [h("span", { say: ["export_step", { step: number(step) }] }), mark && " · ", mark && h("span", { say: mark })];
      return h("option", { value: name }, words);
    });
    this.checkpoint = h("select", {}, options);
    if (checkpoint) this.checkpoint.value = checkpoint;
    this.options = h("div", { class: "exports-options" });
    this.wrong = h("p", { class: "begin-wrong", role: "alert", hidden: true });
    this.begin = button("export_begin", () => this.start(), { kind: "primary", drawing: "download" });
    this.element = h(
      "div",
      { class: "exports-form" },
      h("fieldset", { class: "begin-presets exports-forms" }, h("legend", { say: "export_form" }), this.radios),
      labelled(saying("export_checkpoint"), this.checkpoint).element,
      this.options,
      this.wrong,
      h("div", { class: "begin-buttons" }, this.begin),
    );
    this.choose(this.form);
  }

  #choice(form) {
    const given = { type: "radio", name: "export-form", value: form.form, checked: form === this.form };
    const control = h("input", { ...given, onchange: () => this.choose(form) });
    const words = h("span", {}, h("b", { say: NAMES[form.form] ?? "export_form" }), h("small", {}, form.help));
    return h("label", { class: "begin-preset" }, control, words);
  }

  choose(form) {
    Object.assign(this, { form, values: {} });
    const own = form.options.filter((option) => option.own || option.required);
    const others = form.options.filter((option) => !own.includes(option));
    const grid = (options) => h("div", { class: "begin-grid" }, options.map((option) => this.#option(option)));
    fill(
      this.options,
      own.length > 0 && grid(own),
      others.length > 0 && h("details", { class: "begin-part" }, h("summary", { say: "export_options" }), grid(others)),
    );
    this.wrong.hidden = true;
  }

  #option(option) {
    const { name, kind, choices, help, default: usual } = option;
    const set = (value) => {
      if (value === "" || value === usual) delete this.values[name];
      else this.values[name] = value;
    };
    let control;
    if (kind === "boolean") {
      const answers = [h("option", { value: "false", say: "train_no" }), h("option", { value: "true", say: "train_yes" })];
      control = h("select", { onchange: () => set(control.value === "true") }, answers);
    } else if (choices) {
      const offered = choices.map((one) => h("option", { value: one }, one));
      control = h("select", { onchange: () => set(control.value) }, offered);
      control.value = usual;
    } else {
      const read = (text) => (kind === "text" || text === "" || !Number.isFinite(Number(text)) ? text : Number(text));
      const given = { type: "text", inputmode: "decimal", autocomplete: "off", value: usual ?? "" };
      control = h("input", { ...given, oninput: () => set(read(control.value.trim())) });
    }
    return labelled((id) => h("label", { for: id }, h("code", {}, option.flag)), control, { line: help }).element;
  }

  async start() {
    this.wrong.hidden = true;
    this.begin.disabled = true;
    try {
      const body = { form: this.form.form, checkpoint: this.checkpoint.value, options: this.values };
      await post(`runs/${encodeURIComponent(this.run.name)}/exports`, body);
      await this.list.refresh();
      this.list.element.scrollIntoView({ block: "nearest" });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.wrong.textContent = error.told();
      this.wrong.hidden = false;
    } finally {
      this.begin.disabled = false;
    }
  }
}

class ExportList {
  #timer = 0;
  #drawn = "";
  #left = false;

  constructor() {
    this.rows = h("ul", { class: "exports-list" });
    this.none = h("p", { class: "hint", say: "export_none" });
    const kept = h("p", { class: "hint", say: "export_kept" });
    this.element = h("section", { class: "exports-made" }, h("h3", { say: "export_list" }), this.none, this.rows, kept);
  }

  async refresh() {
    clearTimeout(this.#timer);
    const { exports: made } = await get("exports");
    if (this.#left) return;
    const now = JSON.stringify(made);
    if (now !== this.#drawn) {
      this.#drawn = now;
      this.none.hidden = made.length > 0;
      fill(this.rows, made.map((one) => this.#row(one)));
    }
    if (made.some(({ state }) => state === "running")) {
      this.#timer = setTimeout(() => this.refresh().catch(tell), SECONDS * 1000);
    }
  }

  leave() {
    this.#left = true;
    clearTimeout(this.#timer);
  }

  #row(one) {
    const { id, name, state, lines, bytes, certificate, command } = one;
    const isRunning = state === "running";
    const act = async (pressed) => {
      pressed.disabled = true;
      await remove(`exports/${id}`).catch(tell);
      await this.refresh().catch(tell);
    };
    const turns = isRunning && h("span", { class: "begin-spinner" });
    const pill = h("span", { class: `exports-state ${state}` }, turns, h("span", { say: STATES[state] }));
    const shown = lines.slice(-6).join("\n");
    const size = bytes === null ? null : h("span", { class: "hint" }, megabytes(bytes));
    return h(
      "li",
      { class: "card" },
      h("div", { class: "exports-head" }, h("b", {}, name), pill, size),
      certificate && certificateTiles(certificate),
      shown && !certificate && h("pre", { class: `exports-lines ${state}`, tabindex: "0", role: "log", "aria-label": name }, shown),
      h("code", { class: "exports-command" }, command),
      h(
        "div",
        { class: "begin-buttons" },
        isRunning
          ? button("export_end", (event) => act(event.currentTarget), { drawing: "stop" })
          : button("export_remove", (event) => act(event.currentTarget), { drawing: "remove" }),
        state === "done" && downloadLink(id, name),
      ),
    );
  }
}

function downloadLink(id, name) {
  const given = { class: "button primary", href: url(`exports/${id}/download`), download: `${name}.zip` };
  return h("a", given, icon("download"), h("span", { say: "export_download" }));
}

const megabytes = (bytes) => (bytes >= 1e9 ? `${number(bytes / 1e9, 2)} GB` : `${number(bytes / 1e6, 1)} MB`);

/** The figures that the certificate states. */
function certificateTiles(certificate) {
  const { loss_before: before, loss_after: after, greedy_equal: equal, measured_on: on, alignment } = certificate;
  const tile = (value, key, about) =>
    h("div", { class: "begin-tile" }, h("span", { say: key }), h("b", {}, value), about && h("small", { say: about }));
  const known = (value) => typeof value === "number";
  const within = certificate.within_tolerance && certificate.tolerance ? "export_within" : null;
  const asked = on?.questions ? ["export_of_questions", { count: number(on.questions) }] : null;
  const certain = known(alignment?.gap_at_least) ? ["export_points", { points: number(alignment.gap_at_least, 1) }] : null;
  return h(
    "div",
    { class: "begin-tiles exports-figures" },
    known(before) && known(after) && tile(`${number(before, 4)} → ${number(after, 4)}`, "export_loss", within),
    known(equal) && tile(`${number(equal, 1)} %`, "export_equal", asked),
    known(alignment?.gap) && tile(number(alignment.gap, 1), "export_gap", certain),
  );
}
