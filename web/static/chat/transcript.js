// The turns of the open conversation. Only those that differ from what is shown are changed.

import { fill, h } from "../core/dom.js";
import { Message } from "./message.js";

const KEPT = /^[0-9a-f]{64}\.\w+$/; // the name of a picture that the server keeps

export class Transcript {
  /** `actions`: what `Message` needs, but for `picture`. */
  constructor(chat, actions) {
    this.chat = chat;
    this.messages = new Map(); // by node, in their order
    this.actions = {
      ...actions,
      picture: (name) => (KEPT.test(name) ? `conversations/${chat.id}/pictures/${name}` : name),
    };
    this.divider = h("p", { class: "divider" }, h("span", { say: "not_read_any_more" }));
    this.element = h("div", { class: "transcript", role: "log", "aria-live": "off", label: "conversation" });
  }

  /** Forget what is shown: another conversation is open. */
  clear() {
    this.messages.clear();
    fill(this.element);
  }

  show() {
    const { turns, answer } = this.chat;
    const shown = this.messages;
    const nodes = new Set(turns.map((turn) => turn.node));
    this.messages = new Map();
    turns.forEach((turn, index) => {
      const message = shown.get(turn.node) ?? this.#confirmed(turn, shown, nodes) ?? new Message(turn, this.actions);
      message.update(turn, index === turns.length - 1);
      this.messages.set(turn.node, message);
    });
    this.element.classList.toggle("busy", Boolean(answer));
    this.#place(turns);
  }

  /** The message that has shown a turn before the server gave it its number. */
  #confirmed(turn, shown, nodes) {
    const name = turn.role === "user" ? "question" : "answer";
    const message = nodes.has(name) ? null : shown.get(name);
    shown.delete(name);
    return message;
  }

  #place(turns) {
    const elements = [];
    turns.forEach((turn, index) => {
      if (index && turns[index - 1].unread && !turn.unread) elements.push(this.divider);
      elements.push(this.messages.get(turn.node).element);
    });
    const wanted = new Set(elements);
    for (const child of [...this.element.children]) if (!wanted.has(child)) child.remove();
    elements.forEach((element, index) => {
      const there = this.element.children[index];
      if (there !== element) this.element.insertBefore(element, there ?? null);
    });
  }

  /** The answer that is being written has grown. */
  grow() {
    const turn = this.chat.turns.at(-1);
    this.messages.get(turn.node)?.update(turn, true);
  }

  /** Let the question of a node be changed in its place. */
  edit(node, text) {
    this.messages.get(node)?.edit(text);
  }

  /** Give the keyboard to the version buttons of a node that has taken another one's place. */
  focusVersions(node) {
    this.messages.get(node)?.versions.querySelector("button:not(:disabled)")?.focus({ preventScroll: true });
  }

  /** Show what is written in the reader's language in a new one. */
  speak() {
    for (const message of this.messages.values()) message.showNote();
  }
}
