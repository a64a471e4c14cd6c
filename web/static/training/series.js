// The points of a run's log, asked for as they are added.

import { get } from "../core/api.js";

const MOST = 4000; // points of a series that are held; then the server is asked for its shape again

/** The path of a run's routes below /app/. */
export const pathOf = (run, rest = "") => `runs/${encodeURIComponent(run)}${rest}`;

export class Series {
  constructor(run) {
    this.run = run;
    this.series = {};
    this.version = "";
    this.last = null;
    this.whole = true;
  }

  /** Ask for what is new; returns whether anything is. */
  async refresh() {
    const isLong = Object.values(this.series).some((points) => points.length > MOST);
    const more = this.last !== null && !isLong ? `?since=${this.last}&version=${encodeURIComponent(this.version)}` : "";
    const told = await get(pathOf(this.run, `/curves${more}`));
    if (told.more) {
      const isNew = Object.entries(told.series).map(([name, points]) => this.#add(name, points));
      this.last = told.last;
      return isNew.some(Boolean);
    }
    const before = JSON.stringify(this.series);
    Object.assign(this, { series: told.series, version: told.version, last: told.last, whole: told.whole });
    return before !== JSON.stringify(told.series);
  }

  /** All points between two steps, where only the shape of a long log is held. */
  async between([from, to]) {
    const part = `?since=${Math.max(0, Math.floor(from))}&until=${Math.max(0, Math.ceil(to))}`;
    return (await get(pathOf(this.run, `/curves${part}`))).series;
  }

  // The points of the last step are told again: an evaluation is logged after the record of its step.
  #add(name, points) {
    const known = (this.series[name] ??= []);
    if (!points.length) return false;
    const [first] = points[0];
    const kept = known.filter(([step]) => step < first);
    const isNew = known.length - kept.length !== points.length;
    known.splice(0, known.length, ...kept, ...points);
    return isNew;
  }
}
