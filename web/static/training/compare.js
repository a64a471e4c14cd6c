// Several runs in one picture, and in what their recipes differ.

import { get } from "../core/api.js";
import { button, fill, h } from "../core/dom.js";
import { link } from "../core/router.js";
import { say, t } from "../core/texts.js";
import { Chart } from "./chart.js";
import { chartTools, COLOURS } from "./curves.js";
import { figure } from "./scale.js";
import { pathOf, Series } from "./series.js";
import { View } from "./view.js";

export const MOST_COMPARED = COLOURS.length;

// Each chart, and the points of a run that it shows.
const CHARTS = [
  { title: "loss", height: 280, isLoss: true, points: ({ loss }) => loss, smooth: true },
  { title: "validation_loss", isLoss: true, points: (series) => series.validation_loss, dots: true },
  { title: "right_answers", unit: " %", floor: 0, ceiling: 100, points: ({ right }) => right, dots: true },
  { title: "gap_over_steps", floor: 0, points: gaps, dots: true },
];

function gaps({ right = [], swapped = [] }) {
  const others = new Map(swapped);
  return right.filter(([step]) => others.has(step)).map(([step, value]) => [step, value - others.get(step)]);
}

export class Comparison {
  #data = new Map(); // run -> Series
  #recipes = new Map(); // run -> {field: value}
  #names = [];

  constructor({ onEnd }) {
    this.view = new View();
    const name = () => t("comparison");
    this.charts = CHARTS.map((about) => ({ about, chart: new Chart({ ...about, view: this.view, name }) }));
    this.reset = button("reset_zoom", () => this.view.zoom(null), { hidden: true, class: "small" });
    this.tools = chartTools(() => this.draw(), this.reset, button("end_comparison", onEnd, { class: "small" }));
    const look = () => this.element.scrollIntoView({ behavior: "smooth", block: "start" });
    this.told = h("span", {});
    this.bar = h(
      "div",
      { class: "compare-bar", hidden: true },
      this.told,
      button("show_comparison", look, { kind: "primary", class: "small", drawing: "curves" }),
      button("end_comparison", onEnd, { class: "small" }),
    );
    this.table = h("div", { class: "compared" });
    const [first, ...others] = this.charts.map(({ chart }) => chart.element);
    this.hint = h("p", { class: "hint", say: ["compare_hint", { most: MOST_COMPARED }] });
    this.body = h("div", {}, first, h("div", { class: "small-charts three" }, others), this.table);
    this.element = h(
      "section",
      { class: "card comparison", hidden: true },
      h("header", { class: "section-head" }, h("h2", { say: "comparison" }), this.tools.element),
      this.hint,
      this.body,
    );
    // The bar leads to the comparison, and goes when that is in sight.
    new IntersectionObserver(([{ isIntersecting }]) => this.bar.classList.toggle("away", isIntersecting)).observe(this.element);
    this.view.on((what) => what === "domain" && (this.reset.hidden = !this.view.zoomed));
  }

  /** Compare the runs of these names. */
  async show(names) {
    this.#names = names;
    this.element.hidden = !names.length;
    this.body.hidden = names.length < 2;
    this.hint.hidden = names.length >= 2;
    this.bar.hidden = names.length < 2;
    say(this.told, { content: ["runs_compared", { count: names.length }] });
    if (names.length >= 2) await this.refresh();
  }

  /** Ask for what is new of the runs that are compared and, if `there` are named, are there. */
  async refresh(there = null) {
    const names = this.#names;
    if (names.length < 2) return;
    const asked = names.map(async (name) => {
      if (there && !there.has(name)) return;
      const data = this.#data.get(name) ?? new Series(name);
      this.#data.set(name, data);
      await data.refresh();
      if (!this.#recipes.has(name)) {
        const { recipe } = await get(pathOf(name));
        if (recipe) this.#recipes.set(name, new Map(recipe.fields.map((field) => [field.name, field.value])));
      }
    });
    await Promise.allSettled(asked); // one that was removed has nothing to show
    if (names === this.#names) this.draw();
  }

  draw() {
    const { isLog, smoothing } = this.tools.settings();
    const runs = this.#names.map((name, index) => ({ name, colour: COLOURS[index], series: this.#data.get(name)?.series ?? {} }));
    const last = Math.max(1, ...runs.flatMap(({ series }) => Object.values(series).map((points) => points.at(-1)?.[0] ?? 0)));
    this.view.extent = [0, last];
    for (const { about, chart } of this.charts) {
      chart.settings = { smoothing, isLog: isLog && Boolean(about.isLoss) };
      chart.draw(
        runs.map(({ name, colour, series }) => {
          const { smooth, dots } = about;
          return { label: name, colour, points: about.points(series) ?? [], smooth, dots };
        }),
      );
    }
    this.#tabulate(runs);
  }

  /** What each run ended with, and the fields in which they differ. */
  #tabulate(runs) {
    const last = (points) => (points?.length ? figure(points.at(-1)[1]) : "—");
    const results = [
      ["loss", (series) => last(series.loss)],
      ["validation_loss", (series) => last(series.validation_loss)],
      ["right_answers", (series) => last(series.right)],
      ["gap_over_steps", (series) => last(gaps(series))],
    ];
    const recipes = runs.map(({ name }) => this.#recipes.get(name));
    const known = recipes.filter(Boolean); // a run that has saved nothing yet does not tell its own
    const fields = [...new Set(known.flatMap((recipe) => [...recipe.keys()]))].filter(
      (field) => field !== "run" && new Set(known.map((recipe) => recipe.get(field))).size > 1,
    );
    const title = fields.length ? "recipes_differ" : "recipes_equal";
    fill(
      this.table,
      h(
        "table",
        {},
        h("caption", { class: "visually-hidden", say: "comparison" }),
        h("thead", {}, h("tr", {}, h("td", {}), runs.map(columnHead))),
        h(
          "tbody",
          {},
          results.map(([key, value]) => row({ say: key }, null, runs.map(({ series }) => value(series)))),
        ),
        known.length > 1 && h(
          "tbody",
          {},
          h("tr", { class: "table-head" }, h("th", { scope: "rowgroup", colspan: runs.length + 1, say: title })),
          fields.map((field) => row({}, h("code", {}, field), recipes.map((recipe) => recipe?.get(field) || "—"))),
        ),
      ),
    );
  }
}

const columnHead = ({ name, colour }) =>
  h("th", { scope: "col" }, h("i", { style: { background: colour } }), h("a", { href: link("training", name) }, name));

const row = (given, head, values) =>
  h(
    "tr",
    {},
    h("th", { scope: "row", ...given }, head),
    values.map((value) => h("td", {}, value)),
  );
