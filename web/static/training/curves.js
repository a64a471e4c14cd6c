// The curves of a run: charts that share one axis of steps, and how they are drawn.

import { blob, save } from "../core/api.js";
import { button, h } from "../core/dom.js";
import { remember, remembered } from "../core/remembered.js";
import { number, t } from "../core/texts.js";
import { tell } from "../core/toast.js";
import { Chart } from "./chart.js";
import { pathOf, Series } from "./series.js";
import { View } from "./view.js";

export const COLOURS = [1, 2, 3, 4, 5].map((index) => `var(--series-${index})`);
const DETAIL_PAUSE = 250; // milliseconds after a zoom until more points are asked for

// What each chart shows: [series, its name, how].
const CHARTS = [
  {
    title: "loss",
    height: 300,
    isLoss: true,
    shows: [["loss", "trained", { smooth: true }], ["validation_loss", "validated", { dots: true }]],
  },
  {
    title: "alignment_over_steps",
    unit: " %",
    floor: 0,
    ceiling: 100,
    shows: [["right", "right", { dots: true }], ["swapped", "swapped", { dots: true }], ["blank", "blank", { dots: true }]],
  },
  { title: "gradient_norm", floor: 0, canLog: true, shows: [["gradient_norm", "all_weights", { smooth: true }]], owners: true },
  { title: "learning_rate", floor: 0, shows: [["learning_rate", "learning_rate", {}]] },
  { title: "tokens_per_second", floor: 0, shows: [["tokens_per_second", "tokens_per_second", { smooth: true }]] },
];

/** What is set for all charts: a slider that smooths, and the logarithm. Calls `change` after each. */
export function chartTools(change, ...more) {
  const settings = () => ({ smoothing: 0, isLog: false, ...remembered("training.charts", {}) });
  const set = (name, value) => {
    remember("training.charts", { ...settings(), [name]: value });
    change(settings());
  };
  const { smoothing, isLog } = settings();
  const shown = h("output", {}, number(smoothing, 2));
  const slider = h("input", {
    type: "range",
    min: 0,
    max: 0.95,
    step: 0.05,
    value: smoothing,
    label: "smoothing",
    oninput: (event) => {
      shown.textContent = number(Number(event.target.value), 2);
      set("smoothing", Number(event.target.value));
    },
  });
  const log = h("input", { type: "checkbox", checked: isLog, onchange: (event) => set("isLog", event.target.checked) });
  const element = h(
    "div",
    { class: "chart-tools" },
    h("label", { class: "tool" }, h("span", { say: "smoothing" }), slider, shown),
    h("label", { class: "tool" }, log, h("span", { say: "log_scale" })),
    more,
  );
  return { element, settings };
}

export class Curves {
  #detail = null; // the points of the part in sight, where all of them were asked for
  #timer = 0;

  constructor(run) {
    this.run = run;
    this.data = new Series(run);
    this.view = new View();
    const name = () => run;
    this.charts = CHARTS.map((about) => ({ about, chart: new Chart({ ...about, view: this.view, name }) }));
    this.reset = button("reset_zoom", () => this.view.zoom(null), { hidden: true, class: "small" });
    const csv = button("save_csv", () => this.#saveCsv(), { drawing: "download", class: "small" });
    this.tools = chartTools(() => this.draw(), this.reset, csv);
    const [first, ...others] = this.charts.map(({ chart }) => chart.element);
    this.element = h(
      "section",
      { class: "card curves" },
      h("header", { class: "section-head" }, h("h2", { say: "curves" }), this.tools.element),
      first,
      h("div", { class: "small-charts" }, others),
      h("p", { class: "hint", say: "chart_help" }),
    );
    this.view.on((what) => what === "domain" && this.#zoomed());
  }

  /** Ask for new points, and draw them if there are any. */
  async refresh() {
    if (await this.data.refresh()) this.draw();
  }

  draw() {
    const { isLog, smoothing } = this.tools.settings();
    const all = this.#detail ?? this.data.series;
    const steps = Object.values(this.data.series).flatMap((points) => (points.length ? [points[0][0], points.at(-1)[0]] : []));
    const last = Math.max(0, ...steps);
    this.view.extent = last > 0 ? [0, last] : [-1, 1];
    if (steps.length && Math.min(...steps) === last) this.view.extent = [last - 1, last + 1];
    for (const { about, chart } of this.charts) {
      chart.settings = { smoothing, isLog: isLog && Boolean(about.isLoss || about.canLog) };
      chart.floor = about.floor ?? null;
      chart.draw(this.#shown(about, all));
    }
  }

  #shown(about, all) {
    const shows = [...about.shows];
    if (about.owners) {
      for (const name of Object.keys(all)) if (name.startsWith("norm_")) shows.push([name, "", { smooth: true }]);
    }
    return shows.map(([name, key, how], index) => ({
      label: key ? t(key) : name.slice("norm_".length),
      colour: COLOURS[index % COLOURS.length],
      points: all[name] ?? [],
      ...how,
    }));
  }

  #zoomed() {
    const { zoomed } = this.view;
    this.reset.hidden = !zoomed;
    clearTimeout(this.#timer);
    if (!zoomed && this.#detail) {
      this.#detail = null;
      this.draw();
    } else if (zoomed && !this.data.whole) this.#timer = setTimeout(() => this.#look(zoomed).catch(tell), DETAIL_PAUSE);
  }

  async #look(domain) {
    const found = await this.data.between(domain);
    if (this.view.zoomed !== domain) return; // it has moved on
    this.#detail = { ...this.data.series, ...found };
    this.draw();
  }

  #saveCsv() {
    blob("GET", pathOf(this.run, "/curves.csv"))
      .then((file) => save(file, `${this.run}-curves.csv`))
      .catch(tell);
  }
}
