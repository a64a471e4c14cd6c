// The bar above the chat: which model answers, how well it looks, what it knows, and how full its context is.

import { fill, h, icon, iconButton } from "../core/dom.js";
import { onSite, site, start } from "../core/model.js";
import { number, onLanguage, t } from "../core/texts.js";
import { tell } from "../core/toast.js";
import { attachPopover } from "./popover.js";
import { openSystemPrompt } from "./system.js";

const NEARLY_FULL = 0.8; // of the context, from where on it is offered to drop turns
const ASKED_AGAIN = 30_000; // milliseconds, at least, between two looks at the model when the window gets the focus

export function mountBar(element, chat) {
  element.classList.add("chat-bar");
  const name = h("strong", { class: "bar-name" });
  const about = h("p", { class: "bar-about", role: "status" });
  const model = h("button", { type: "button", class: "bar-model", title: "bar_model" }, name);
  const gauge = h("span", { class: "bar-gauge", "aria-hidden": "true" }, h("i"));
  const points = h("span", { class: "bar-points" });
  const alignment = h("button", { type: "button", class: "bar-chip", title: "bar_alignment" }, gauge, points);
  const ring = h("span", { class: "bar-ring", "aria-hidden": "true" });
  const share = h("span", { class: "bar-share" });
  const context = h("button", { type: "button", class: "bar-chip", title: "bar_context" }, ring, share);
  const system = h(
    "button",
    { type: "button", class: "bar-chip bar-system", onclick: () => openSystemPrompt(chat, drawConversation) },
    icon("lines"),
    h("span", { class: "bar-word", say: "system_prompt" }),
  );
  const offer = h("div", { class: "bar-offer", role: "status" });
  const row = h("div", { class: "bar-row" }, model, about, h("div", { class: "bar-chips" }, system, alignment, context));
  element.append(row, offer);
  const refused = new Set(); // offers that the reader has closed, by conversation
  const closeModel = attachPopover(model, "bar_model", () => aboutModel(site().model));
  attachPopover(alignment, "bar_alignment", () => aboutAlignment(site().model));
  const closeContext = attachPopover(context, "bar_context", () => aboutContext(chat, dropOldest));

  function drawModel(told) {
    const facts = told.model;
    element.dataset.state = facts.state;
    const step = () => (facts.step ? h("span", { class: "bar-step" }, t("bar_step", { step: number(facts.step) })) : null);
    fill(name, facts.name || "PhiSight", step());
    fill(about, step(), stateText(facts)); // the one or the other step is shown, as the window is wide
    about.title = facts.error;
    alignment.hidden = !facts.alignment;
    if (!facts.alignment) return;
    const { right, swapped } = facts.alignment;
    const apart = t("bar_points", { points: number(right - swapped) });
    points.textContent = apart;
    alignment.setAttribute("aria-label", t("bar_alignment_is", { points: number(right - swapped) }));
    Object.assign(gauge.firstChild.style, { left: `${Math.min(right, swapped)}%`, right: `${100 - Math.max(right, swapped)}%` });
  }

  function drawConversation() {
    const held = chat.conversation?.context ?? null;
    context.hidden = !held || !chat.conversation.turns.length;
    if (held) {
      const part = held.used / held.of;
      const percent = number(Math.round(part * 100));
      share.textContent = `${percent} %`;
      ring.style.setProperty("--share", `${Math.min(100, part * 100)}%`);
      context.dataset.full = part > 1 ? "over" : part > NEARLY_FULL ? "nearly" : "no";
      context.setAttribute("aria-label", t("bar_context_is", { percent }));
    }
    drawOffer(held);
    const prompt = chat.conversation ? chat.conversation.system : chat.system;
    system.classList.toggle("set", Boolean(prompt));
    system.title = prompt ? t("system_set", { words: shortened(prompt) }) : t("system_unset");
    system.setAttribute("aria-label", `${t("system_prompt")}: ${prompt ? t("system_is_set") : t("system_is_unset")}`);
  }

  function drawOffer(held) {
    const { questions: count } = oldest(chat.conversation);
    const text = held?.used > held?.of ? "bar_over" : "bar_nearly";
    const name = `${chat.id} ${text}`; // a conversation that has become too long is another matter than one that is nearly so
    const wanted = Boolean(held) && held.used / held.of > NEARLY_FULL && count > 0 && !refused.has(name);
    offer.hidden = !wanted;
    if (!wanted) return fill(offer);
    const percent = number(Math.round((held.used / held.of) * 100));
    const close = () => {
      refused.add(name);
      drawOffer(held);
    };
    return fill(
      offer,
      icon("warning"),
      h("p", {}, h("strong", {}, t(text, { percent })), " ", t("bar_drop_does")),
      dropButton(count, chat, dropOldest),
      iconButton("close", "close", close),
    );
  }

  async function dropOldest() {
    closeContext();
    try {
      await chat.drop(oldest(chat.conversation).turns);
    } catch (error) {
      tell(error);
    }
  }

  function draw() {
    closeModel();
    drawModel(site());
    drawConversation();
  }

  let looked = Date.now();
  addEventListener("focus", () => {
    if (Date.now() - looked < ASKED_AGAIN) return;
    looked = Date.now();
    start().catch((error) => console.debug("the model was not asked for:", error.message)); // the next question tells it
  });
  onSite(draw);
  onLanguage(draw);
  chat.on((kind) => ["opened", "changed", "busy"].includes(kind) && drawConversation());
  drawConversation();
}

/** What is said of the model below its name. */
function stateText({ state, knows, error }) {
  if (state === "loading") return t("bar_loading");
  if (state === "failed") return error || t("bar_failed");
  return error ? t("bar_kept") : t(knows === "tiny" ? "knows_tiny" : "knows_general");
}

/**
 * What to leave out: the older half of the questions that the model still reads, with their answers, but never the
 * last one. `questions` is their number, `turns` how many turns of the conversation are then left out in all.
 */
function oldest(conversation) {
  const turns = conversation?.turns ?? [];
  const read = turns.flatMap((turn, index) => (turn.role === "user" && !turn.unread ? [index] : []));
  const questions = Math.floor(read.length / 2);
  return { questions, turns: questions ? read[questions] : 0 };
}

function dropButton(count, chat, run) {
  const text = count === 1 ? "bar_drop_one" : ["bar_drop", { count }];
  return h("button", { type: "button", class: "button bar-drop", onclick: run, disabled: chat.busy }, h("span", { say: text }));
}

const shortened = (text) => (text.length > 200 ? `${text.slice(0, 199)}…` : text);

// -- what opens at a click -----------------------------------------------------------------------

function aboutModel(facts) {
  const rows = [
    ["bar_checkpoint", facts.source],
    facts.step ? ["bar_trained", t("bar_steps", { steps: number(facts.step) })] : null,
    facts.context ? ["bar_reads", t("bar_tokens", { tokens: number(facts.context) })] : null,
  ].filter(Boolean);
  return [
    h("h3", {}, facts.name),
    h("p", { class: facts.state === "failed" || facts.error ? "bar-error" : "" }, stateText(facts)),
    facts.error && facts.state !== "failed" ? h("p", { class: "bar-error" }, facts.error) : "",
    h("dl", {}, rows.flatMap(([key, value]) => [h("dt", { say: key }), h("dd", {}, value)])),
  ];
}

function aboutAlignment({ alignment: shares }) {
  const bar = (key, value, help) =>
    h(
      "div",
      { class: `bar-share-of ${key}` },
      h("div", {}, h("span", { say: key }), h("b", {}, `${number(value, value % 1 ? 1 : 0)} %`)),
      h("span", { class: "bar-track", "aria-hidden": "true" }, h("i", { style: { width: `${value}%` } })),
      h("small", { say: help }),
    );
  return [
    h("h3", { say: "bar_alignment" }),
    h(
      "p",
      { class: "bar-large" },
      h("b", {}, number(shares.right - shares.swapped)),
      h("span", { say: "bar_apart" }),
    ),
    bar("bar_right", shares.right, "bar_right_help"),
    bar("bar_swapped", shares.swapped, "bar_swapped_help"),
    bar("bar_blank", shares.blank, "bar_blank_help"),
    h("p", { class: "hint", say: ["bar_measured", { step: number(shares.step) }] }),
  ];
}

function aboutContext(chat, drop) {
  const { used, of } = chat.conversation.context;
  const { questions: count } = oldest(chat.conversation);
  return [
    h("h3", { say: "bar_context" }),
    h("p", { class: "bar-large" }, h("b", {}, number(used)), h("span", { say: ["bar_of_tokens", { of: number(of) }] })),
    h(
      "div",
      { class: `bar-track${used > of ? " over" : used / of > NEARLY_FULL ? " nearly" : ""}`, "aria-hidden": "true" },
      h("i", { style: { width: `${Math.min(100, (used / of) * 100)}%` } }),
    ),
    h("p", { class: "hint", say: "bar_context_help" }),
    count ? h("p", { class: "hint", say: "bar_drop_does" }) : "",
    count ? dropButton(count, chat, drop) : "",
  ];
}
