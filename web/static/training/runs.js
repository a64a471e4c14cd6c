// All runs: those that train now first, then the newest; ticked ones are compared.

import { fill, h } from "../core/dom.js";
import { link } from "../core/router.js";
import { number, say } from "../core/texts.js";
import { figure } from "./scale.js";
import { ago, ProgressBar, StatePill } from "./state.js";

/** Keep one element for each run, in their order, so that nothing flickers and nothing loses focus. */
class Rows {
  #rows = new Map();

  constructor(element, make) {
    Object.assign(this, { element, make });
  }

  update(runs) {
    const names = new Set(runs.map(({ name }) => name));
    for (const [name, row] of this.#rows) {
      if (names.has(name)) continue;
      row.element.remove();
      this.#rows.delete(name);
    }
    runs.forEach((run, index) => {
      const row = this.#rows.get(run.name) ?? this.make(run.name);
      this.#rows.set(run.name, row);
      row.update(run);
      const place = this.element.children[index] ?? null;
      if (place !== row.element) this.element.insertBefore(row.element, place);
    });
  }
}

export class RunList {
  /** `ticked`: names of the runs that are compared; `onTick` is called after it has changed. */
  constructor({ ticked, most, onTick }) {
    this.list = h("ul", { class: "runs" });
    this.none = h("p", { class: "nothing", say: "no_runs", hidden: true });
    this.more = h("p", { class: "hint", hidden: true });
    this.element = h("div", {}, this.list, this.none, this.more);
    this.rows = new Rows(this.list, (name) => row(name, { ticked, most, onTick }));
  }

  /** `told`: what the route of the runs says. */
  update({ runs, left_out: leftOut }) {
    this.none.hidden = runs.length > 0;
    this.list.hidden = !runs.length;
    this.more.hidden = !leftOut;
    if (leftOut) say(this.more, { content: ["runs_left_out", { count: number(leftOut) }] });
    this.rows.update(runs);
  }
}

function row(name, { ticked, most, onTick }) {
  const [state, progress] = [new StatePill(), new ProgressBar()];
  const figures = h("dl", { class: "run-figures" });
  const updated = h("span", { class: "hint" });
  const error = h("p", { class: "run-error", hidden: true });
  const tick = h("input", {
    type: "checkbox",
    label: ["compare_run", { name }],
    checked: ticked.has(name),
    onchange: () => {
      if (tick.checked && ticked.size >= most) tick.checked = false;
      else if (tick.checked) ticked.add(name);
      else ticked.delete(name);
      onTick();
    },
  });
  const element = h(
    "li",
    { class: "run", dataset: { run: name } },
    h("label", { class: "run-tick", title: ["compare_run", { name }] }, tick),
    h(
      "a",
      { class: "run-link", href: link("training", name) },
      h("span", { class: "run-name" }, h("b", {}, name), state.element, updated),
      progress.element,
      figures,
      error,
    ),
  );
  let drawn = "";
  const update = (run) => {
    updated.textContent = ago(Date.now() / 1000 - run.updated);
    element.classList.toggle("live", run.running);
    state.update(run);
    progress.update(run);
    const now = JSON.stringify(run);
    if (now === drawn && element.lang === document.documentElement.lang) return;
    [drawn, element.lang] = [now, document.documentElement.lang];
    error.hidden = !run.error;
    error.textContent = run.error;
    const gap = run.right === null || run.swapped === null ? "—" : number(run.right - run.swapped, 1);
    fill(
      figures,
      pair("loss", run.loss === null ? "—" : figure(run.loss)),
      pair("right_short", run.right === null ? "—" : `${number(run.right, 0)} %`),
      pair("gap_over_steps", gap),
    );
  };
  return { element, update };
}

const pair = (key, value) => h("div", {}, h("dt", { say: key }), h("dd", {}, value));

/** The runs beside the page, to go from one to another. */
export class RunLinks {
  constructor() {
    this.list = h("ul", { class: "run-links" });
    this.all = h("a", { href: link("training"), class: "run-links-all", say: "all_runs" });
    this.element = h("div", { class: "run-links-room", role: "navigation", label: "runs" }, this.all, this.list);
    this.rows = new Rows(this.list, sideRow);
    this.chosen = "";
  }

  update({ runs }) {
    this.rows.update(runs.map((run) => ({ ...run, chosen: run.name === this.chosen })));
    if (this.chosen) this.all.removeAttribute("aria-current");
    else this.all.setAttribute("aria-current", "page");
  }
}

function sideRow(name) {
  const words = h("small", {});
  const anchor = h("a", { href: link("training", name) }, h("i", { class: "dot" }), h("span", {}, name), words);
  const update = ({ state, running, chosen, step, total_steps: total }) => {
    anchor.className = running ? "live" : state;
    if (chosen) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
    const percent = total ? `${number((100 * step) / total, 0)} %` : number(step);
    say(words, { content: running ? ["percent_done", { percent }] : `state_${state}` });
  };
  return { element: h("li", {}, anchor), update };
}
