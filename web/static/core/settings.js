// How answers are made, recordings understood and answers spoken: remembered by the browser, and sent
// with every question. The names are those of web/settings.py.

import { site } from "./model.js";
import { remember, remembered } from "./remembered.js";

export const DEFAULTS = {
  temperature: 0,
  top_p: 1,
  top_k: 0,
  repetition_penalty: 1,
  no_repeat_ngram_size: 0,
  max_new_tokens: 256,
  seed: "",
  spoken: "",
  translate: false,
  denoise: false,
  aloud: false,
};

/** The settings as they were chosen. */
export function chosenSettings() {
  const kept = remembered("settings", {});
  return Object.fromEntries(
    Object.entries(DEFAULTS).map(([name, value]) => [name, typeof kept[name] === typeof value ? kept[name] : value]),
  );
}

/** The settings as the server takes them: without what its Whisper cannot do. */
export function settings() {
  const { translate, ...others } = chosenSettings();
  const can = site()?.can ?? {};
  return { ...others, translate: translate && Boolean(can.translate) };
}

export function changeSetting(name, value) {
  remember("settings", { ...chosenSettings(), [name]: value });
}
