// "Train a new run": what is trained, on what, how, and under which name; then train.py is started.

import { ApiError, get, post } from "../core/api.js";
import { openDialog } from "../core/dialog.js";
import { button, fill, h } from "../core/dom.js";
import { site } from "../core/model.js";
import { go } from "../core/router.js";
import { onLanguage, say, t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { endDraft, theDraft } from "./draft.js";
import { changedList, Fields } from "./fields.js";
import { ModelChoice } from "./models.js";
import { CommandBox, labelled, problemText, saying, textInput } from "./parts.js";
import { Preflight } from "./preflight.js";

export const mayTrain = () => site()?.can.training === "train";
const hear = new Set(); // what is to be done when a training has begun, stopped or gone on

/** Call `listener` when a training was started, stopped or resumed from this page. */
export const onTraining = (listener) => hear.add(listener);
export const trainingChanged = () => hear.forEach((listener) => listener());

/** The button that begins a run; where that is not allowed, one line that says how it would be. */
export function mountStart(element, { refresh = () => {} } = {}) {
  if (!mayTrain()) {
    element.append(h("p", { class: "hint begin-not", say: "training_only_looked_at" }));
    return;
  }
  onTraining(() => refresh());
  element.append(button("train_new", () => beginTraining().catch(tell), { kind: "primary", drawing: "add" }));
}

/** Open the window; `from` is the name of a run whose weights to begin with. */
export async function beginTraining(from = "") {
  const draft = await theDraft();
  const { runs } = await get("runs");
  if (from) {
    const { preset, values } = await get(`trainings/recipes/${encodeURIComponent(from)}`);
    draft.choose(preset, values, from);
    draft.name = "";
  }
  const names = runs.map(({ name }) => name);
  if (!draft.name) draft.name = freeName(from || draft.preset, names);
  new StartWindow(draft, names);
}

/** "tiny" -> "tiny-2", where "tiny" is taken. */
function freeName(wanted, names) {
  const stem = wanted.replace(/-\d+$/, "");
  for (let count = 1; ; count++) {
    const name = count === 1 ? stem : `${stem}-${count}`;
    if (!names.includes(name)) return name;
  }
}

class StartWindow {
  #step = 0;

  constructor(draft, names) {
    this.draft = draft;
    this.model = new ModelChoice(draft, names);
    this.preflight = new Preflight(draft);
    this.fields = new Fields(draft);
    this.command = new CommandBox();
    this.last = this.#lastStep();
    this.steps = [
      { key: "train_model", part: this.model, fields: ["preset", "base", "vision", "start_from"] },
      { key: "train_data", part: this.preflight, fields: ["data", "images"] },
      { key: "train_settings_short", part: this.fields, fields: null },
      { key: "train_begin", part: this.last, fields: ["name"] },
    ];
    this.tabs = this.steps.map(({ key }, index) => {
      const words = [h("span", { class: "begin-number" }, String(index + 1)), h("span", { say: key })];
      return h("button", { type: "button", class: "begin-step", onclick: () => this.show(index) }, words);
    });
    this.back = button("train_back", () => this.show(this.#step - 1));
    this.next = button("train_next", () => this.forward(), { kind: "primary" });
    this.wrong = h("p", { class: "begin-wrong", role: "alert", hidden: true });
    this.body = h("div", { class: "begin-body" }, this.steps.map(({ part }) => part.element));
    const form = h(
      "div",
      { class: "begin" },
      h("nav", { class: "begin-steps", label: "train_steps" }, this.tabs),
      this.body,
      h(
        "footer",
        { class: "begin-foot" },
        this.wrong,
        this.command.element,
        h("div", { class: "begin-buttons" }, this.back, this.next),
      ),
    );
    const off = [draft.on(() => this.update()), onLanguage(() => this.update())];
    this.close = openDialog("train_new", form, {
      class: "begin-window",
      onClose: () => {
        this.preflight.leave();
        off.forEach((end) => end());
      },
    });
    draft.ask().catch(tell);
    this.show(0);
  }

  #lastStep() {
    const control = textInput(() => this.draft.rename(control.value.trim()), { maxlength: "64" });
    control.addEventListener("keydown", (event) => event.key === "Enter" && this.forward());
    const named = labelled(saying("train_name"), control, "train_name_about");
    const summary = h("div", { class: "begin-summary" });
    const heading = h("h3", { say: "train_summary" });
    const element = h("div", { class: "begin-last" }, named.element, heading, summary, h("p", { class: "hint", say: "train_survives" }));
    const update = () => {
      if (control.value.trim() !== this.draft.name) control.value = this.draft.name;
      named.refuse(this.draft.problemOf("name"));
      fill(summary, this.#summary());
    };
    return { element, update };
  }

  #summary() {
    const { draft } = this;
    const rows = [
      ["train_base", draft.value("base")],
      ["train_encoder", draft.value("vision")],
      draft.startFrom && ["train_from", draft.startFrom],
      ["train_conversations", String(draft.value("data"))],
      ["train_pictures", String(draft.value("images"))],
    ].filter(Boolean);
    const own = new Set(["base", "vision", "data", "images"]);
    const changed = Object.keys(draft.values).filter((name) => !own.has(name));
    const told = (value) => h("dd", value ? {} : { say: "train_empty_value" }, value || null);
    return [
      h("dl", { class: "begin-changed" }, rows.map(([key, value]) => [h("dt", { say: key }), told(value)]).flat()),
      changed.length > 0 && h("p", { class: "begin-subhead", say: ["train_changed", { count: changed.length }] }),
      changed.length > 0 && changedList({ values: Object.fromEntries(changed.map((name) => [name, draft.values[name]])) }),
    ];
  }

  show(index) {
    this.#step = Math.max(0, Math.min(index, this.steps.length - 1));
    this.update();
    this.body.scrollTop = 0;
  }

  update() {
    const { draft } = this;
    const step = this.#step;
    this.steps.forEach(({ part }, index) => {
      part.element.hidden = index !== step;
      part.update();
    });
    this.tabs.forEach((tab, index) => {
      if (index === step) tab.setAttribute("aria-current", "step");
      else tab.removeAttribute("aria-current");
      tab.classList.toggle("wrong", this.#problemsAt(index).length > 0);
      tab.classList.toggle("done", index === 1 ? draft.isChecked : index < step);
    });
    this.command.update(draft.command);
    this.back.hidden = step === 0;
    const isLast = step === this.steps.length - 1;
    this.next.classList.toggle("begin-start", isLast);
    say(this.next.querySelector("span"), { content: isLast ? "train_start" : "train_next" });
    this.next.disabled = isLast && (!draft.settled || draft.problems.length > 0 || !draft.isChecked);
    const free = draft.problems.filter(({ field }) => field === null);
    const elsewhere = isLast ? draft.problems.filter(({ field }) => field !== null && field !== "name") : [];
    const unread = isLast && !draft.isChecked && !elsewhere.length ? [{ key: "train_check_first" }] : [];
    const named = elsewhere.map((one) => `${one.field}: ${problemText(one)}`);
    const lines = [...free.map(problemText), ...named, ...unread.map(problemText)];
    this.wrong.hidden = lines.length === 0 || step < 2;
    this.wrong.textContent = lines.join(" · ");
  }

  #problemsAt(index) {
    const named = this.steps.flatMap(({ fields }) => fields ?? []);
    const { fields } = this.steps[index];
    return this.draft.problems.filter(({ field }) => {
      if (field === "data" && !this.draft.isChecked) return false; // a folder may have been named
      return fields ? fields.includes(field) : field !== null && !named.includes(field);
    });
  }

  async forward() {
    if (this.#step === 1 && !this.draft.isChecked) {
      await this.preflight.run(); // its report is read before anything else
      return;
    }
    if (this.#step < this.steps.length - 1) this.show(this.#step + 1);
    else await this.start();
  }

  async start() {
    const { draft } = this;
    if (this.next.disabled) return;
    this.next.disabled = true;
    say(this.next.querySelector("span"), { content: "train_starting" });
    try {
      const { name } = await post("trainings/start", draft.body);
      endDraft();
      this.close();
      toast(t("train_started", { name }));
      trainingChanged();
      go("training", name);
    } catch (error) {
      this.update();
      if (!(error instanceof ApiError)) throw error;
      this.wrong.textContent = error.told();
      this.wrong.hidden = false;
    }
  }
}
