// What a run is doing, as a word with a colour, and how far it is.

import { h } from "../core/dom.js";
import { language, number, say, span } from "../core/texts.js";

/** How a state looks: it goes on, ended well, or needs somebody. */
const KINDS = { finished: "good", failed: "bad", crashed: "bad", damaged: "bad", stopped: "" };

export class StatePill {
  constructor() {
    this.element = h("span", { class: "pill" });
  }

  /** `told`: {state, running}. */
  update({ state, running }) {
    const kind = running ? "live" : (KINDS[state] ?? "");
    this.element.className = `pill state ${kind}`;
    say(this.element, { content: `state_${state}` });
  }
}

export class ProgressBar {
  constructor() {
    this.fill = h("div", {});
    const given = { class: "progress-track", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 };
    this.track = h("div", { ...given, label: "steps_done" }, this.fill);
    this.words = h("span", { class: "progress-words" });
    this.left = h("span", { class: "progress-left hint" });
    this.element = h("div", { class: "progress" }, this.track, h("div", {}, this.words, this.left));
  }

  /** `told`: {step, total_steps, eta_seconds, running}. */
  update({ state, step, total_steps: total, eta_seconds: eta, running }) {
    this.element.hidden = (state === "damaged" || state === "failed") && !step; // how far it is, nobody knows
    const share = total ? Math.min(1, step / total) : 0;
    this.fill.style.width = `${share * 100}%`;
    this.track.classList.toggle("live", Boolean(running));
    this.track.setAttribute("aria-valuenow", Math.round(share * 100));
    const values = { step: number(step), total: number(total ?? 0), percent: number(share * 100, 0) };
    say(this.words, { content: total ? ["step_of_total", values] : ["step_of", values] });
    this.left.hidden = eta === null || eta === undefined;
    if (!this.left.hidden) say(this.left, { content: ["time_left_is", { span: span(eta) }] });
  }
}

const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];

/** A time that has passed, in its largest unit, as the language says it. */
export function ago(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [unit, length] = UNITS.find(([, length]) => whole >= length) ?? UNITS.at(-1);
  return new Intl.RelativeTimeFormat(language(), { numeric: "always" }).format(-Math.floor(whole / length), unit);
}
