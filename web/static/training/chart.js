// One chart. Gradio's plots need its own components around them and Python behind them, and draw
// nothing on a page of plain elements: so lines, axes, zoom and hover are drawn here, in SVG.

import { fill, h, iconButton } from "../core/dom.js";
import { number, t } from "../core/texts.js";
import * as scales from "./scale.js";
import { s, savePng, svgText } from "./svg.js";

const MARGIN = { left: 58, right: 14, top: 10, bottom: 30 };
const DRAG = 6; // pixels that a finger or a mouse must move to zoom

export class Chart {
  #series = []; // {label, colour, points, drawn, dots, raw}
  #places = []; // [step] of every point in sight, for the keyboard and the pointer
  #width = 0;
  #drag = null;

  /**
   * `title`: a key of web/texts; `view`: a `View`, which charts may share; `floor` and `ceiling`: what
   * the axis of values covers at least; `unit`: behind every value; `name`: of the file that is saved.
   */
  constructor({ title, view, height = 220, floor = null, ceiling = null, unit = "", name = () => "chart" }) {
    Object.assign(this, { title, view, height, floor, ceiling, unit, name });
    this.settings = { smoothing: 0, isLog: false };
    this.legend = h("ul", { class: "chart-legend" });
    this.svg = s("svg", { height, width: "100%", "aria-hidden": "true" });
    this.tip = h("div", { class: "chart-tip", hidden: true });
    this.plot = h("div", { class: "chart-plot", tabindex: "0", role: "slider", label: title }, this.svg, this.tip);
    this.empty = h("p", { class: "chart-empty hint", say: "no_records" });
    this.png = iconButton("download", "save_png", () => this.savePng());
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("h3", { say: title }), this.png),
      this.legend,
      this.plot,
      this.empty,
    );
    this.#listen();
    view.on((what) => (what === "at" ? this.#point() : this.render()));
    new ResizeObserver(([{ contentRect }]) => {
      if (Math.abs(contentRect.width - this.#width) < 1) return;
      this.#width = contentRect.width;
      this.render();
    }).observe(this.plot);
    this.render();
  }

  /** Show these series: {label, colour, points, dots, smooth}; `dots` for few points that are far apart. */
  draw(series) {
    const { smoothing } = this.settings;
    this.#series = series
      .filter(({ points }) => points.length)
      .map((one) => {
        const is = smoothing > 0 && one.smooth && one.points.length > 2;
        return { ...one, drawn: is ? scales.smoothed(one.points, smoothing) : one.points, raw: is };
      });
    this.render();
  }

  render() {
    const { plot, empty, svg, view, settings, height } = this;
    const known = this.#series.length > 0;
    plot.hidden = this.legend.hidden = !known;
    this.png.disabled = !known;
    empty.hidden = known;
    if (!known || this.#width < 80) return;
    const width = this.#width;
    const domain = view.domain;
    const seen = this.#series.map((one) => ({
      ...one,
      drawn: scales.inSight(one.drawn, domain),
      points: one.raw ? scales.inSight(one.points, domain) : [],
    }));
    const values = seen.flatMap(({ drawn, points }) => [...drawn, ...points].map(([, value]) => value));
    const { floor, ceiling } = this;
    const isLog = settings.isLog && values.some((value) => value > 0);
    let [low, high] = scales.range(values, { floor, ceiling, isLog });
    const rows = isLog ? scales.logTicks(low, high) : scales.ticks(low, high, Math.max(3, height / 42));
    if (!isLog) [low, high] = [rows[0], rows.at(-1)];
    this.x = scales.scale(domain, [MARGIN.left, width - MARGIN.right]);
    this.y = scales.scale([low, high], [height - MARGIN.bottom, MARGIN.top], isLog);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.over = s("g", { "pointer-events": "none" });
    fill(svg, this.#axes(rows, width), this.#lines(seen, width), this.over);
    this.#collectPlaces(domain);
    this.#point();
  }

  #axes(rows, width) {
    const { x, y, height, view } = this;
    const labels = scales.tickLabels(rows);
    const bottom = height - MARGIN.bottom;
    const across = rows.map((value, index) =>
      s(
        "g",
        {},
        s("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value), stroke: "var(--line)" }),
        svgText(MARGIN.left - 8, y(value) + 4, labels[index] + this.unit, { "text-anchor": "end", "font-size": 11.5 }),
      ),
    );
    const [from, to] = view.domain;
    const down = scales
      .ticks(from, to, Math.max(2, width / 62))
      .filter((step) => step >= from && step <= to && Number.isInteger(step))
      .map((step) => svgText(x(step), bottom + 18, number(step), { "text-anchor": "middle", "font-size": 11.5 }));
    return [...across, ...down];
  }

  #lines(seen, width) {
    const { x, y, height } = this;
    const box = { x: 0, y: 0, width: width - MARGIN.right + 6, height: height - MARGIN.bottom + 4 };
    const drawn = seen.map(({ colour, drawn, points, dots, raw }) => {
      const line = { fill: "none", stroke: colour, "stroke-linejoin": "round", "stroke-linecap": "round" };
      const marked = dots || drawn.length === 1 ? drawn.filter(([, value]) => Number.isFinite(y(value))) : [];
      return [
        raw && s("path", { ...line, d: scales.pathOf(points, x, y), "stroke-width": 1.2, opacity: 0.28 }),
        drawn.length > 1 && s("path", { ...line, d: scales.pathOf(drawn, x, y), "stroke-width": 2, class: "line" }),
        marked.length <= 80 &&
          marked.map(([step, value]) =>
            s("circle", { cx: x(step), cy: y(value), r: 3.5, fill: colour, stroke: "var(--surface)", "stroke-width": 1.5 }),
          ),
      ];
    });
    drawn.reverse(); // the first one lies on top
    return s("svg", { ...box, viewBox: `0 0 ${box.width} ${box.height}`, overflow: "hidden" }, drawn.flat(2));
  }

  #collectPlaces([low, high]) {
    const steps = new Set();
    for (const { drawn } of this.#series) {
      for (const [step] of drawn) if (step >= low && step <= high) steps.add(step);
    }
    this.#places = [...steps].sort((a, b) => a - b).map((step) => [step]);
  }

  // -- what is pointed at --------------------------------------------------------------------------

  /** Mark the step that the view points at, with the values nearest to it. */
  #point() {
    const { view, over, plot, tip } = this;
    if (!over || !this.#series.length) return;
    const [low, high] = view.domain;
    const step = view.at !== null && view.at >= low && view.at <= high ? view.at : null;
    const told = this.#series.map((one) => {
      const index = step === null ? one.drawn.length - 1 : scales.nearest(one.drawn, step);
      const [place, value] = one.drawn[index];
      return { ...one, place, value, isHere: step !== null && place === step };
    });
    fill(
      this.legend,
      told.map(({ label, colour, value }) =>
        h("li", {}, h("i", { style: { background: colour } }), label, h("b", {}, scales.figure(value) + this.unit)),
      ),
    );
    const here = told.filter((one) => one.isHere);
    plot.setAttribute("aria-valuemin", Math.floor(low));
    plot.setAttribute("aria-valuemax", Math.ceil(high));
    plot.setAttribute("aria-valuenow", step ?? Math.ceil(high));
    const values = (step === null ? told : here).map(({ label, value }) => `${label} ${scales.figure(value)}${this.unit}`);
    const said = t("step_of", { step: number(step ?? told[0].place) });
    plot.setAttribute("aria-valuetext", `${said}: ${values.join(", ")}`);
    if (step === null) {
      fill(over);
      tip.hidden = true;
      return;
    }
    const x = this.x(step);
    const dashed = { stroke: "var(--muted)", "stroke-dasharray": "3 3" };
    fill(
      over,
      s("line", { x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom, ...dashed }),
      here
        .filter(({ value }) => Number.isFinite(this.y(value)))
        .map(({ value, colour }) =>
          s("circle", { cx: x, cy: this.y(value), r: 4.5, fill: colour, stroke: "var(--surface)", "stroke-width": 2 }),
        ),
    );
    this.#tell(step, here, x);
  }

  #tell(step, here, x) {
    const { tip, plot } = this;
    const isMine = plot.matches(":hover") || plot === document.activeElement;
    tip.hidden = !isMine || !here.length || this.#drag?.moved === true;
    if (tip.hidden) return;
    fill(
      tip,
      h("strong", {}, t("step_of", { step: number(step) })),
      here.map(({ label, colour, value }) =>
        h("span", {}, h("i", { style: { background: colour } }), label, h("b", {}, scales.figure(value) + this.unit)),
      ),
    );
    const half = tip.offsetWidth / 2;
    tip.style.left = `${Math.min(Math.max(x, half + 2), this.#width - half - 2)}px`;
  }

  // -- pointer, wheel and keyboard -----------------------------------------------------------------

  #listen() {
    const { plot, view } = this;
    const place = (event) => event.clientX - plot.getBoundingClientRect().left;
    const nearest = (event) => {
      if (!this.#places.length) return null;
      return this.#places[scales.nearest(this.#places, this.x.back(place(event)))][0];
    };
    plot.addEventListener("pointermove", (event) => {
      if (this.#drag) this.#select(place(event));
      else view.point(nearest(event));
    });
    plot.addEventListener("pointerleave", () => this.#drag || (plot !== document.activeElement && view.point(null)));
    plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.#drag = { from: place(event), to: place(event), moved: false };
      plot.setPointerCapture(event.pointerId);
      view.point(nearest(event));
    });
    plot.addEventListener("pointerup", () => this.#release(true));
    plot.addEventListener("pointercancel", () => this.#release(false));
    plot.addEventListener("dblclick", () => view.zoom(null));
    plot.addEventListener("blur", () => view.point(null));
    plot.addEventListener(
      "wheel",
      (event) => {
        // The page is scrolled by the wheel, unless the chart was clicked into or Ctrl is held.
        if (!(event.ctrlKey || event.metaKey || plot === document.activeElement) || !this.x) return;
        event.preventDefault();
        view.zoomAt(this.x.back(place(event)), event.deltaY > 0 ? 1.25 : 0.8);
      },
      { passive: false },
    );
    plot.addEventListener("keydown", (event) => this.#key(event));
  }

  #select(to) {
    const drag = this.#drag;
    drag.to = to;
    drag.moved ||= Math.abs(drag.to - drag.from) > DRAG;
    if (!drag.moved) return;
    this.tip.hidden = true;
    const [left, right] = [Math.min(drag.from, to), Math.max(drag.from, to)];
    const height = this.height - MARGIN.bottom - MARGIN.top;
    fill(this.over, s("rect", { x: left, y: MARGIN.top, width: right - left, height, fill: "var(--accent)", opacity: 0.18 }));
  }

  #release(isDone) {
    const drag = this.#drag;
    this.#drag = null;
    if (drag?.moved && isDone) {
      const steps = [this.x.back(drag.from), this.x.back(drag.to)].sort((a, b) => a - b);
      this.view.point(null);
      this.view.zoom(steps);
    } else this.#point();
  }

  #key(event) {
    const { view } = this;
    const last = this.#places.length - 1;
    if (last < 0) return;
    const at = view.at === null ? last : scales.nearest(this.#places, view.at);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: last }[event.key];
    if (to !== undefined) view.point(this.#places[Math.max(0, Math.min(last, to))][0]);
    else if (event.key === "+" || event.key === "=") view.zoomAt(this.#places[at][0], 0.7);
    else if (event.key === "-") view.zoomAt(this.#places[at][0], 1.4);
    else if (event.key === "0" || (event.key === "Escape" && view.zoomed)) view.zoom(null);
    else if (event.key === "Escape") view.point(null);
    else return;
    event.preventDefault();
  }

  savePng() {
    this.view.point(null);
    const name = `${this.name()}-${t(this.title)}.png`;
    return savePng(this.svg, { title: `${this.name()} · ${t(this.title)}`, legend: this.#series, name });
  }
}
