// One run: how it stands, what it has learnt, and what it was asked to do.

import { ApiError, get } from "../core/api.js";
import { fill, h, icon } from "../core/dom.js";
import { link } from "../core/router.js";
import { number, say } from "../core/texts.js";
import { runActions } from "./actions.js";
import { Checkpoints } from "./checkpoints.js";
import { Curves } from "./curves.js";
import { DataCounts } from "./data.js";
import { Meter } from "./meter.js";
import { Recipe } from "./recipe.js";
import { Samples } from "./samples.js";
import { figure } from "./scale.js";
import { pathOf } from "./series.js";
import { ago, ProgressBar, StatePill } from "./state.js";

export class Dashboard {
  #acted = "";
  #drawn = "";

  constructor(run) {
    this.run = run;
    this.state = new StatePill();
    this.progress = new ProgressBar();
    this.actions = h("div", { class: "run-actions" });
    this.notice = h("div", { class: "notice bad", role: "alert", hidden: true });
    this.figures = h("dl", { class: "figures" });
    this.alerts = h("details", { class: "card alerts", hidden: true });
    this.meter = new Meter();
    this.curves = new Curves(run);
    this.samples = new Samples(run);
    this.checkpoints = new Checkpoints(run);
    this.data = new DataCounts();
    this.recipe = new Recipe();
    this.gone = h("p", { class: "nothing", say: ["run_is_gone", { name: run }], hidden: true });
    const standing = h("section", { class: "card standing" }, h("h2", { say: "standing" }), this.progress.element, this.figures);
    this.body = h(
      "div",
      { class: "dashboard-body", hidden: true },
      h("div", { class: "first-row" }, this.meter.element, standing),
      this.alerts,
      this.curves.element,
      this.samples.element,
      h("div", { class: "two-rows" }, this.checkpoints.element, this.data.element),
      this.recipe.element,
    );
    this.element = h(
      "div",
      { class: "dashboard" },
      h("a", { class: "way-back", href: link("training") }, icon("back"), h("span", { say: "all_runs" })),
      h("header", { class: "dashboard-head" }, h("h1", {}, run), this.state.element, this.actions),
      this.notice,
      this.gone,
      this.body,
    );
  }

  /** Read the run again; `isThere`: whether it is among all runs. One that was removed is told to be gone. */
  async refresh(isThere) {
    const told = isThere ? await this.#ask() : null;
    this.gone.hidden = told !== null;
    this.body.hidden = this.actions.hidden = this.state.element.hidden = told === null;
    if (!told) this.notice.hidden = true;
    else {
      this.#update(told);
      await Promise.all([this.curves.refresh(), this.samples.update(told)]);
    }
  }

  async #ask() {
    try {
      return await get(pathOf(this.run));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return null; // removed just now
      throw error;
    }
  }

  #update(told) {
    this.state.update(told);
    this.notice.hidden = !told.error;
    if (told.error !== this.notice.textContent) this.notice.textContent = told.error;
    this.progress.update({ step: 0, total_steps: null, ...told.status, state: told.state, running: told.running });
    this.meter.update(told.alignment);
    this.checkpoints.update(told);
    this.data.update(told);
    this.recipe.update(told);
    this.#tellFigures(told);
    this.#tellAlerts(told.alerts);
    // A button that is being used stays: the actions are made anew only when the run has changed.
    const now = JSON.stringify([told.state, told.running, told.checkpoints.map(({ name }) => name)]);
    if (now === this.#acted) return;
    this.#acted = now;
    fill(this.actions, runActions(told));
  }

  #tellFigures({ status, memory, now, recipe }) {
    const { loss, tokens_per_second: rate, save, logged_at: logged } = status ?? {};
    const peak = memory.cuda_memory_mb ?? memory.memory_mb;
    const rows = [
      ["loss", loss === null || loss === undefined ? null : figure(loss)],
      ["tokens_per_second", rate ? number(rate, 0) : null],
      [memory.cuda_memory_mb ? "gpu_memory" : "memory", peak ? `${number(peak / 1024, 2)} GiB` : null],
      ["last_save", save ? [["saved_at", { step: number(save.step), ago: ago(now - save.at) }]] : null],
      ["last_logged", logged ? ago(now - logged) : null],
      ["preset", recipe ? recipe.preset : null],
    ];
    const drawn = JSON.stringify([rows, document.documentElement.lang]);
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    fill(
      this.figures,
      rows
        .filter(([, value]) => value !== null)
        .map(([key, value]) => {
          const told = Array.isArray(value) ? h("dd", { say: value[0] }) : h("dd", {}, value);
          return h("div", {}, h("dt", { say: key }), told);
        }),
    );
  }

  #tellAlerts(alerts) {
    this.alerts.hidden = !alerts.length;
    if (!alerts.length || this.alerts.dataset.count === String(alerts.length)) return;
    this.alerts.dataset.count = alerts.length;
    const title = h("span", {});
    say(title, { content: ["alerts", { count: number(alerts.length) }] });
    const rows = [...alerts]
      .reverse()
      .map(({ step, text }) => h("li", {}, h("b", { say: ["step_of", { step: number(step ?? 0) }] }), h("span", {}, text)));
    fill(this.alerts, h("summary", {}, icon("warning"), title), h("ul", {}, rows));
  }
}
