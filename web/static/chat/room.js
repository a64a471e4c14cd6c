// The chat room: the conversation, and the place to ask. Its parts share one `Chat`.

import { h, iconButton } from "../core/dom.js";
import { go } from "../core/router.js";
import { onLanguage, t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";
import { mountVoice } from "../voice/voice.js";
import { mountBar } from "./bar.js";
import { copy } from "./clipboard.js";
import { Composer } from "./composer.js";
import { takeFiles } from "./drop.js";
import { Follow } from "./follow.js";
import { mountHistory } from "./history.js";
import { Chat } from "./state.js";
import { Transcript } from "./transcript.js";
import { makeWelcome } from "./welcome.js";

export function mount(element, { side }) {
  const room = new Room(element);
  mountHistory(side, room.chat);
  mountBar(room.bar, room.chat);
  room.listen(mountVoice({ chat: room.chat, composer: room.composer, panel: room.voice }));
  return room;
}

class Room {
  constructor(element) {
    const chat = (this.chat = new Chat());
    this.element = element;
    this.bar = h("div", { class: "chat-bar" });
    this.voice = h("div", { class: "voice-panel" });
    this.said = h("p", { class: "visually-hidden", role: "status", "aria-live": "polite" });
    this.transcript = new Transcript(chat, this.#actions());
    this.welcome = makeWelcome(
      (example) => this.#try(example),
      (question) => this.composer.suggest(question),
    );
    this.composer = new Composer(chat);
    const newest = iconButton("down", "to_the_newest", () => {}, { class: "newest", hidden: true });
    const column = h("div", { class: "column" }, this.welcome, this.transcript.element);
    this.dock = h("div", { class: "dock" }, newest, this.voice, this.composer.element);
    element.append(this.bar, column, this.said, this.dock);
    this.follow = new Follow([column, this.dock], newest);
    const { style } = document.documentElement; // what lies above the dock, such as a toast, asks for it
    new ResizeObserver(() => style.setProperty("--dock", `${this.dock.offsetHeight}px`)).observe(this.dock);
    keepAboveKeyboard();
    takeFiles(element, (files) => this.composer.attachments.add(files));
    onLanguage(() => this.transcript.speak());
  }

  /** Hear of the changes of the chat, when all parts are there. */
  listen(voicePart) {
    this.voicePart = voicePart;
    this.chat.on((kind) => this.#hear(kind));
    this.#hear("opened");
    this.#hear("busy");
  }

  #hear(kind) {
    const { chat, transcript, composer, follow } = this;
    if (kind === "opened") {
      this.wasBusy = false;
      transcript.clear();
      composer.openDraft();
    }
    if (kind === "opened" || kind === "changed" || kind === "heard") {
      if (kind === "changed") composer.moveDraft();
      transcript.show();
      const isEmpty = chat.turns.length === 0;
      follow.isEmpty = isEmpty;
      this.welcome.hidden = !isEmpty;
      transcript.element.hidden = isEmpty;
    }
    const isAsked = kind === "busy" && chat.busy && !this.wasBusy;
    if (kind === "opened" || isAsked) follow.toEnd();
    if (kind === "text") transcript.grow();
    if (kind === "busy") {
      composer.showBusy();
      this.#announce();
    }
    follow.keep();
  }

  /** Tell listeners of the page that an answer is being written, and then what it is. */
  #announce() {
    const last = this.chat.turns.at(-1);
    const { busy } = this.chat;
    if (busy) this.said.textContent = t("being_answered");
    else if (this.wasBusy) this.said.textContent = last?.role === "assistant" ? last.text : "";
    this.wasBusy = busy;
    this.element.dataset.busy = busy;
  }

  /** What the buttons at a turn do. */
  #actions() {
    const { chat } = this;
    const told = (promise) => promise.catch(tell);
    return {
      copy: async (text) => {
        await copy(text);
        this.said.textContent = t("copied");
      },
      again: (turn) => this.#asked(chat.regenerate(turn.node)),
      edit: (turn, text) =>
        this.#asked(chat.edit(turn.node, text), (error) => !error.asked && this.transcript.edit(turn.node, text)),
      show: (node) => told(chat.show(node).then(() => this.transcript.focusVersions(node))),
      cut: (turn) => told(this.#cut(turn)),
    };
  }

  async #asked(promise, onError = () => {}) {
    this.follow.toEnd();
    try {
      await promise;
    } catch (error) {
      onError(error);
      tell(error);
    }
  }

  async #cut(turn) {
    if (this.isCutting) return; // the second click of two
    this.isCutting = true;
    const cut = await this.chat.cut(turn.node).finally(() => (this.isCutting = false));
    this.composer.focus(); // the button that was pressed has gone
    toast(t("deleted_from_here"), { action: { text: "undo", run: () => this.chat.undo(cut).catch(tell) } });
  }

  #try({ key, question, picture }) {
    return this.#asked(this.chat.ask({ text: question, example: key, pictures: [picture] }));
  }

  // -- as a room of the page ----------------------------------------------------------------------

  show(argument, name) {
    const { chat } = this;
    const isBack = !this.follow.isOn || name !== chat.mode; // from another room, or to another mode
    chat.mode = name === "voice" ? "voice" : "chat";
    this.follow.begin();
    this.voicePart.show(chat.mode);
    if (!argument && isBack && chat.id) go(name, chat.id, { replace: true });
    else if (argument !== chat.id) this.#open(argument);
    this.composer.focus();
  }

  async #open(id) {
    try {
      await this.chat.open(id);
    } catch (error) {
      tell(error);
      go(this.chat.mode, this.chat.id, { replace: true });
    }
  }

  hide() {
    this.follow.end();
    this.voicePart.show("hidden");
  }
}

/** Where a phone's keyboard covers the window's foot, the place to ask stands above it. */
function keepAboveKeyboard() {
  const view = window.visualViewport;
  const move = () => {
    const covered = view.scale > 1.01 ? 0 : Math.max(0, innerHeight - view.height - view.offsetTop);
    document.documentElement.style.setProperty("--keyboard", `${covered}px`);
  };
  for (const event of ["resize", "scroll"]) view?.addEventListener(event, move);
}
