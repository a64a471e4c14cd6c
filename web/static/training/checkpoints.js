// The checkpoints of a run: what was known at their steps, whether they are intact, and a chat with
// one of them.

import { post } from "../core/api.js";
import { button, fill, h, icon } from "../core/dom.js";
import { start } from "../core/model.js";
import { go } from "../core/router.js";
import { number, t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { figure } from "./scale.js";
import { pathOf } from "./series.js";
import { ago } from "./state.js";

export class Checkpoints {
  #drawn = "";
  #busy = new Set();
  #rows = [];

  constructor(run) {
    this.run = run;
    this.list = h("ul", { class: "checkpoints" });
    this.none = h("p", { class: "hint", say: "no_checkpoints" });
    this.element = h("section", { class: "card checkpoints-card" }, h("h2", { say: "checkpoints" }), this.list, this.none);
  }

  /** `told`: the dashboard. */
  update({ checkpoints }) {
    this.#rows = checkpoints;
    const now = JSON.stringify([checkpoints, [...this.#busy]]);
    if (now === this.#drawn) return;
    this.#drawn = now;
    this.none.hidden = checkpoints.length > 0;
    fill(this.list, checkpoints.map((one) => this.#row(one)));
  }

  #row(one) {
    const { name, step, best, bytes, at, verified } = one;
    const busy = this.#busy.has(name);
    const size = `${number(bytes / 1e6, 1)} MB`;
    return h(
      "li",
      {},
      h(
        "div",
        { class: "checkpoint-words" },
        h(
          "p",
          { class: "checkpoint-name" },
          h("b", { say: ["step_of", { step: number(step) }] }),
          best && h("span", { class: "pill good", say: "best" }),
          this.#check(verified, busy),
        ),
        h("p", { class: "hint" }, [facts(one), size, ago(Date.now() / 1000 - at)].filter(Boolean).join(" · ")),
        verified?.problems.length > 0 && h("ul", { class: "problems" }, verified.problems.map((text) => h("li", {}, text))),
      ),
      h(
        "div",
        { class: "checkpoint-actions" },
        button("verify", () => this.#verify(name), { disabled: busy, class: "small" }),
        button("chat_with_this", () => this.#chat(name), { drawing: "chat", class: "small" }),
      ),
    );
  }

  #check(verified, busy) {
    if (busy) return h("span", { class: "pill", say: "verifying" });
    if (!verified) return null;
    const intact = !verified.problems.length;
    return h(
      "span",
      { class: `pill ${intact ? "good" : "bad"}` },
      icon(intact ? "check" : "warning"),
      h("span", { say: intact ? "verified" : "damaged" }),
    );
  }

  async #verify(name) {
    this.#busy.add(name);
    this.update({ checkpoints: this.#rows });
    try {
      const verified = await post(pathOf(this.run, `/checkpoints/${encodeURIComponent(name)}/verify`));
      this.#rows = this.#rows.map((one) => (one.name === name ? { ...one, verified } : one));
    } catch (error) {
      tell(error);
    } finally {
      this.#busy.delete(name);
      this.update({ checkpoints: this.#rows });
    }
  }

  async #chat(checkpoint) {
    try {
      await post("model", { run: this.run, checkpoint });
      toast(t("model_is_loading", { name: `${this.run} · ${checkpoint}` }));
      start().catch(tell);
      go("chat");
    } catch (error) {
      tell(error);
    }
  }
}

/** What the log says of a checkpoint's step: loss, and how far apart the answers are. */
function facts({ loss, validation_loss: validation, right, swapped }) {
  const parts = [];
  if (validation) parts.push(t("validation_is", { value: figure(validation.value) }));
  else if (loss) parts.push(t("loss_is", { value: figure(loss.value) }));
  if (right && swapped) parts.push(t("right_is", { right: number(right.value, 0), gap: number(right.value - swapped.value, 0) }));
  return parts.join(" · ");
}
