// What several charts show together: a part of the steps, and the step that is pointed at.

export class View {
  /** All steps that there are. */
  extent = [0, 1];
  /** The steps in sight after zooming; null: all. */
  zoomed = null;
  /** The step that is pointed at, or null. */
  at = null;
  #listeners = new Set();

  get domain() {
    return this.zoomed ?? this.extent;
  }

  /** Call `listener` with "domain" or "at" when that has changed. */
  on(listener) {
    this.#listeners.add(listener);
  }

  #tell(what) {
    for (const listener of this.#listeners) listener(what);
  }

  /** Show these steps; all of them for null. What is narrower than two steps is widened. */
  zoom(domain) {
    if (domain) {
      const [from, to] = this.extent;
      let [low, high] = [Math.max(from, domain[0]), Math.min(to, domain[1])];
      if (high - low < 2) {
        const middle = (low + high) / 2;
        [low, high] = [middle - 1, middle + 1];
      }
      domain = low <= from && high >= to ? null : [low, high];
    }
    this.zoomed = domain;
    this.#tell("domain");
  }

  /** Show more or fewer steps around one. */
  zoomAt(step, factor) {
    const [low, high] = this.domain;
    this.zoom([step - (step - low) * factor, step + (high - step) * factor]);
  }

  point(step) {
    if (step === this.at) return;
    this.at = step;
    this.#tell("at");
  }
}
