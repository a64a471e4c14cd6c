// The settings: how answers are made, recordings understood and answers spoken, and how the page looks.
// What is chosen holds at once, and is remembered.

import { openDialog } from "../core/dialog.js";
import { button, h, icon } from "../core/dom.js";
import { site } from "../core/model.js";
import { remembered } from "../core/remembered.js";
import { changeSetting, chosenSettings, DEFAULTS } from "../core/settings.js";
import { chooseLanguage, language } from "../core/texts.js";
import { chooseTheme, THEMES } from "../core/theme.js";
import { tell } from "../core/toast.js";

const MOST_TOKENS = 2048; // of an answer that can be asked for here
const SAMPLING = [
  { name: "temperature", text: "set_temperature", help: "set_temperature_help", min: 0, max: 2, step: 0.05 },
  { name: "top_p", text: "set_top_p", help: "set_top_p_help", min: 0.05, max: 1, step: 0.05 },
  { name: "top_k", text: "set_top_k", help: "set_top_k_help", min: 0, max: 200, step: 1 },
  { name: "repetition_penalty", text: "set_repetition", help: "set_repetition_help", min: 1, max: 2, step: 0.05 },
  { name: "no_repeat_ngram_size", text: "set_ngram", help: "set_ngram_help", min: 0, max: 10, step: 1 },
  { name: "max_new_tokens", text: "set_longest", help: "set_longest_help", min: 1, max: MOST_TOKENS, step: 1 },
];
const DRAWN_ONLY = ["top_p", "top_k", "seed"]; // without effect at a temperature of 0

/** The button at the foot of the sidebar; the settings open by Ctrl and comma too. */
export function settingsButton() {
  addEventListener("keydown", (event) => {
    if (event.key !== "," || !(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    openSettings();
  });
  return h(
    "button",
    { type: "button", class: "settings-button", onclick: openSettings, title: "set_title", "aria-keyshortcuts": "Control+Comma" },
    icon("settings"),
    h("span", { say: "settings" }),
    h("kbd", { "aria-hidden": "true" }, "Ctrl ,"),
  );
}

export function openSettings() {
  const { can } = site();
  const shown = []; // what shows the values again after they were changed from elsewhere
  const reset = button("set_reset", () => toDefaults(), { drawing: "again" });
  const form = h(
    "form",
    { class: "settings-form" },
    section("set_look", languageField(), themeField(shown, changed)),
    section("set_answers", ...SAMPLING.map((one) => rangeField(one, shown, changed)), seedField(shown, changed)),
    (can.hear || can.speak) && section("set_speech", ...speechFields(can, shown, changed)),
    h("footer", {}, h("p", { class: "hint", say: "set_remembered" }), reset),
  );
  form.addEventListener("submit", (event) => event.preventDefault());

  function changed(name, value) {
    if (name) changeSetting(name, value);
    const now = chosenSettings();
    const isDrawn = now.temperature > 0;
    for (const one of DRAWN_ONLY) form.querySelector(`[data-name="${one}"]`).classList.toggle("idle", !isDrawn);
    const areDefaults = Object.keys(DEFAULTS).every((one) => now[one] === DEFAULTS[one]);
    reset.disabled = areDefaults && remembered("theme", "system") === "system";
  }

  function toDefaults() {
    for (const [name, value] of Object.entries(DEFAULTS)) changeSetting(name, value);
    chooseTheme("system");
    for (const show of shown) show();
    changed();
  }

  changed();
  return openDialog("settings", form, { class: "settings-dialog" });
}

function section(heading, ...fields) {
  return h("section", { class: "settings-section" }, h("h3", { say: heading }), fields);
}

/** A field with its name above it, and what it does below. `control` is described by the help. */
function field(name, text, help, control, beside = null) {
  const id = `set-${name}`;
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-help`);
  return h(
    "div",
    { class: "setting", dataset: { name } },
    h("div", { class: "setting-head" }, h("label", { for: id, say: text }), beside),
    control,
    h("small", { id: `${id}-help`, say: help }),
  );
}

/** A number by a slider and by typing it. */
function rangeField({ name, text, help, min, max, step }, shown, changed) {
  const range = h("input", { type: "range", min, max, step });
  const typed = h("input", { type: "number", min, max, step, label: text, class: "setting-number", inputmode: "decimal" });
  const show = () => {
    const value = chosenSettings()[name];
    range.value = typed.value = String(value);
    range.style.setProperty("--done", `${((value - min) / (max - min)) * 100}%`);
  };
  const take = (value) => {
    if (Number.isFinite(value)) changed(name, rounded(Math.round(Math.max(min, Math.min(max, value)) / step) * step));
  };
  range.addEventListener("input", () => {
    take(range.valueAsNumber);
    show();
  });
  typed.addEventListener("input", () => take(typed.valueAsNumber));
  typed.addEventListener("change", show);
  shown.push(show);
  show();
  return field(name, text, help, range, typed);
}

const rounded = (value) => Math.round(value * 1000) / 1000;

function seedField(shown, changed) {
  const about = { inputmode: "numeric", maxlength: 20, placeholder: "set_seed_none", autocomplete: "off" };
  const typed = h("input", { type: "text", ...about });
  const wrong = h("p", { class: "form-error", role: "alert", hidden: true, say: "bad_seed" });
  const show = () => {
    typed.value = chosenSettings().seed;
    judge();
  };
  const judge = () => {
    const isSeed = /^\d*$/.test(typed.value.trim()) && BigInt(typed.value.trim() || 0) < 2n ** 64n;
    wrong.hidden = isSeed;
    typed.setAttribute("aria-invalid", String(!isSeed));
    return isSeed;
  };
  typed.addEventListener("input", () => judge() && changed("seed", typed.value.trim()));
  shown.push(show);
  const made = field("seed", "set_seed", "set_seed_help", typed);
  typed.after(wrong);
  show();
  return made;
}

function speechFields(can, shown, changed) {
  const check = (name, text, help) => {
    const box = h("input", { type: "checkbox", onchange: () => changed(name, box.checked) });
    const show = () => (box.checked = chosenSettings()[name]);
    shown.push(show);
    show();
    return switchField(name, text, help, box);
  };
  return [
    can.hear && spokenField(shown, changed),
    can.translate && check("translate", "set_translate", "set_translate_help"),
    can.hear && check("denoise", "set_denoise", "set_denoise_help"),
    can.speak && check("aloud", "set_aloud", "set_aloud_help"),
  ].filter(Boolean);
}

function switchField(name, text, help, box) {
  const id = `set-${name}`;
  box.id = id;
  box.setAttribute("role", "switch");
  box.setAttribute("aria-describedby", `${id}-help`);
  return h(
    "div",
    { class: "setting setting-switch", dataset: { name } },
    h("div", {}, h("label", { for: id, say: text }), h("small", { id: `${id}-help`, say: help })),
    box,
  );
}

function spokenField(shown, changed) {
  const options = Object.entries(site().spoken).map(([code, name]) =>
    code ? h("option", { value: code, lang: code }, name) : h("option", { value: code, say: "set_detect" }),
  );
  const select = h("select", { onchange: () => changed("spoken", select.value) }, options);
  const show = () => (select.value = chosenSettings().spoken);
  shown.push(show);
  show();
  return field("spoken", "set_spoken", "set_spoken_help", select);
}

function languageField() {
  const options = Object.entries(site().languages).map(([code, name]) => h("option", { value: code, lang: code }, name));
  const select = h("select", {}, options);
  select.value = language();
  select.addEventListener("change", () =>
    chooseLanguage(select.value).catch((error) => {
      select.value = language();
      tell(error);
    }),
  );
  return field("language", "interface_language", "set_language_help", select);
}

const THEME_TEXTS = { system: "set_theme_system", light: "set_theme_light", dark: "set_theme_dark" };

function themeField(shown, changed) {
  const radios = THEMES.map((name) =>
    h("input", {
      type: "radio",
      name: "theme",
      value: name,
      onchange: () => {
        chooseTheme(name);
        changed();
      },
    }),
  );
  const show = () => radios.forEach((one) => (one.checked = one.value === remembered("theme", "system")));
  shown.push(show);
  show();
  return h(
    "fieldset",
    { class: "setting setting-theme", dataset: { name: "theme" }, "aria-describedby": "set-theme-help" },
    h("legend", { say: "set_theme" }),
    h(
      "div",
      { class: "segments" },
      radios.map((one) => h("label", {}, one, h("span", { say: THEME_TEXTS[one.value] }))),
    ),
    h("small", { id: "set-theme-help", say: "set_theme_help" }),
  );
}
