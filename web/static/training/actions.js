// What can be done with a run: stop it, go on with it, begin another with its weights, export it.

import { ApiError, post } from "../core/api.js";
import { openDialog } from "../core/dialog.js";
import { button, h } from "../core/dom.js";
import { number, t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { openExports } from "./exporting.js";
import { labelled, saying } from "./parts.js";
import { beginTraining, mayTrain, trainingChanged } from "./start.js";

const path = (name, what) => `runs/${encodeURIComponent(name)}/${what}`;

/**
 * The buttons of a run. `run`: {name, running, step, total_steps, checkpoints: [{name, step, best}]},
 * as its dashboard is told.
 */
export function runActions(run) {
  if (!mayTrain()) return [];
  const { name, running, checkpoints = [] } = run;
  const [saved, isFinished] = [checkpoints.length > 0, run.state === "finished"];
  return [
    running && button("train_stop", (event) => stop(name, event.currentTarget), { drawing: "stop", title: "train_stop_about" }),
    !running && saved && !isFinished && button("train_resume", () => openResume(run), { drawing: "play", kind: "primary" }),
    !running && saved && isFinished && button("train_longer", () => openResume(run), { drawing: "play" }),
    saved && button("train_from_this", () => beginTraining(name).catch(tell), { drawing: "add" }),
    saved && button("train_export", () => openExports(run).catch(tell), { drawing: "download" }),
  ].filter(Boolean);
}

async function stop(name, pressed) {
  pressed.disabled = true;
  try {
    await post(path(name, "stop"));
    toast(t("train_stopping", { name }));
    trainingChanged();
  } catch (error) {
    pressed.disabled = false;
    tell(error);
  }
}

/** Ask where the run is to end, and go on with it. */
function openResume({ name, checkpoints, state }) {
  const step = Math.max(...checkpoints.map((one) => one.step));
  const until = h("input", { type: "text", inputmode: "numeric", autocomplete: "off" });
  const field = labelled(saying("train_until"), until, "train_until_about");
  const wrong = h("p", { class: "begin-wrong", role: "alert", hidden: true });
  const refuse = (line) => {
    wrong.textContent = line;
    wrong.hidden = false;
  };
  const resume = button("train_resume", () => begin(), { kind: "primary", drawing: "play" });
  until.addEventListener("keydown", (event) => event.key === "Enter" && begin());

  async function begin() {
    const wanted = until.value.trim();
    const isLater = /^\d{1,12}$/.test(wanted) && Number(wanted) > step;
    if ((wanted || state === "finished") && !isLater) {
      refuse(t("train_until_later", { step: number(step) }));
      return;
    }
    resume.disabled = true;
    try {
      await post(path(name, "resume"), { values: wanted ? { max_steps: Number(wanted) } : {} });
      close();
      toast(t("train_resumed", { name }));
      trainingChanged();
    } catch (error) {
      resume.disabled = false;
      if (!(error instanceof ApiError)) throw error;
      refuse(error.told());
    }
  }

  const about = state !== "finished" && h("p", { say: ["train_resume_about", { step: number(step) }] });
  const body = h("div", { class: "begin-resume" }, about, field.element, wrong, h("div", { class: "begin-buttons" }, resume));
  const close = openDialog("train_resume_title", body);
  (state === "finished" ? until : resume).focus();
}
