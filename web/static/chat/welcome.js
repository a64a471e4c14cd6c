// What stands where nothing was asked yet: a greeting, how the model is, and something to ask.

import { url } from "../core/api.js";
import { fill, h } from "../core/dom.js";
import { onSite } from "../core/model.js";

const IDEAS = ["idea_what", "idea_detail", "idea_people", "idea_unusual", "idea_next"]; // about a picture of one's own

/** `ask(example)` is called with {key, question, picture} of the one that is clicked, `suggest(question)`
 * with one that has no picture yet. */
export function makeWelcome(ask, suggest) {
  const state = h("p", { class: "model-state", role: "status", hidden: true });
  const lead = h("p", { class: "lead" });
  const offers = h("ul", { class: "examples" });
  const element = h("div", { class: "welcome", hidden: true }, h("h1", { say: "greeting" }), lead, state, offers);
  let listed = null;
  onSite(({ model, examples }) => {
    state.hidden = model.state === "ready";
    state.className = `model-state ${model.state}`;
    if (model.state === "loading") fill(state, h("span", { say: "loading_calm" }));
    else fill(state, h("span", { say: "loading_failed" }), " ", h("span", { class: "reason" }, model.error));
    const ideas = examples.length === 0 && model.knows === "general" ? IDEAS : []; // the tiny model knows none of it
    const now = JSON.stringify([examples, ideas]);
    if (now === listed) return;
    listed = now;
    fill(lead, h("span", { say: examples.length ? "welcome" : "welcome_own" }));
    offers.className = ideas.length ? "ideas" : "examples";
    fill(offers, examples.map((example) => card(example, ask)), ideas.map((key) => idea(key, suggest)));
  });
  return element;
}

function card(example, ask) {
  const image = h("img", { alt: "" });
  image.src = url(example.picture);
  return h(
    "li",
    {},
    h("button", { type: "button", class: "example", onclick: () => ask(example) }, image, h("span", {}, example.question)),
  );
}

function idea(key, suggest) {
  const button = h("button", { type: "button", class: "idea", say: key, onclick: () => suggest(button.textContent) });
  return h("li", {}, button);
}
