// The chat by voice: questions recorded, answers spoken, and both without hands.

import { ApiError, save } from "../core/api.js";
import { onSite, site } from "../core/model.js";
import { remember, remembered } from "../core/remembered.js";
import { settings } from "../core/settings.js";
import { tell } from "../core/toast.js";
import { HandsFree, HEARING, OFF, THINKING } from "./handsfree.js";
import { decibels, share } from "./levels.js";
import { heardIn } from "./listen.js";
import { IDLE, Panel, RECORDING, UNDERSTANDING } from "./panel.js";
import { longestRecording, MicrophoneError, openMicrophone, recordingOf } from "./recorder.js";
import { Speaker } from "./speaker.js";

const HELD = 500; // milliseconds: a press that lasts longer ends the recording when it is let go
const SHORTEST = 0.3; // seconds in which something can be said
const ECHO = 300; // milliseconds that a room still sounds after the voice
const TAKES_SPACES = "input, textarea, select, button, summary, [contenteditable]";

/** The voice of the chat room; `panel` is its place above the composer. */
export function mountVoice({ chat, composer, panel }) {
  return new Voice(chat, composer, panel);
}

class Voice {
  constructor(chat, composer, element) {
    Object.assign(this, { chat, composer });
    this.mode = "hidden";
    this.recording = null; // {microphone, blocks, samples} while one is made
    this.leaving = null; // what ends the understanding of one
    this.panel = new Panel(element, {
      press: () => this.#press(),
      release: () => this.#release(),
      finish: () => this.#finish(),
      discard: () => this.#discard(),
      upload: (file) => this.#understand(file, file.name),
      handsFree: () => this.#toggleHandsFree(),
      play: () => (this.speaker.speaking ? this.speaker.stop() : this.speaker.again()),
      download: () => save(this.speaker.recording(), "answer.wav"),
      dismiss: () => {
        this.speaker.stop();
        this.panel.spoken({ isShown: false });
      },
      choose: (atOnce) => remember(`ask_at_once.${this.mode}`, atOnce),
    });
    composer.tools.append(this.panel.small);
    this.speaker = new Speaker(() => this.#spoken(), tell);
    this.handsFree = new HandsFree({
      turn: (recording, signal, asked) => this.#turn(recording, signal, asked),
      interrupt: () => this.#interrupt(),
      isAudible: () => this.speaker.speaking || performance.now() < this.audibleUntil,
      onState: (state) => this.#showHandsFree(state),
      onBlock: (samples) => this.speaker.audible || this.panel.hear(samples),
      onError: (error) => this.#failed(error),
    });
    this.audibleUntil = 0;
    chat.on((kind, detail) => this.#hear(kind, detail));
    onSite(() => this.#notice());
    addEventListener("keydown", (event) => this.#key(event));
    addEventListener("keyup", (event) => this.#keyUp(event));
  }

  /** `mode`: "chat", "voice", or "hidden" while another room is shown. */
  show(mode) {
    if (mode === this.mode) return;
    this.handsFree.end();
    this.#discard();
    if (mode === "hidden") this.speaker.stop();
    this.mode = mode;
    const { panel } = this;
    panel.element.dataset.mode = mode;
    panel.atOnce.checked = remembered(`ask_at_once.${mode}`, mode === "voice");
    panel.understood(null);
    this.#notice();
    this.#spoken();
    if (mode === "voice") queueMicrotask(() => panel.orb.focus({ preventScroll: true })); // the space bar speaks
  }

  // -- one recording ------------------------------------------------------------------------------

  #press() {
    if (this.handsFree.isOn) return this.#toggleHandsFree();
    if (this.panel.state === IDLE) return this.#record();
    if (this.panel.state === RECORDING) return this.#finish();
    return this.#discard();
  }

  #release() {
    if (this.recording && performance.now() - this.pressedAt > HELD) this.#finish();
    this.pressedAt = Infinity;
  }

  /** Whether recordings are understood here; tells where not. */
  #canHear() {
    const { can, model } = site();
    if (can.hear) return true;
    this.panel.tell(model.state === "loading" ? "still_loading" : "no_speech_model");
    return false;
  }

  async #record() {
    if (!this.#canHear()) return;
    this.pressedAt = performance.now();
    this.speaker.stop();
    this.panel.tell(null);
    this.panel.understood(null);
    this.panel.show("opening");
    const mine = (this.opening = { blocks: [], samples: 0 });
    try {
      mine.microphone = await openMicrophone(
        (samples) => this.#block(mine, samples),
        () => this.recording === mine && this.#finish(),
      );
    } catch (error) {
      if (this.opening === mine) this.#discard();
      this.#failed(error);
      return;
    }
    if (this.opening !== mine) {
      mine.microphone.close(); // given up before it was open
      return;
    }
    this.opening = null;
    this.recording = mine;
    this.panel.lasts(0);
    this.panel.show(RECORDING);
  }

  #block(mine, samples) {
    if (this.recording !== mine) return;
    mine.blocks.push(samples);
    mine.samples += samples.length;
    const seconds = mine.samples / mine.microphone.rate;
    this.panel.hear(samples);
    this.panel.lasts(seconds);
    if (seconds >= longestRecording()) this.#finish();
  }

  async #finish() {
    const { recording } = this;
    if (!recording) return;
    this.recording = null;
    recording.microphone.close();
    const { blocks, samples, microphone } = recording;
    if (samples < SHORTEST * microphone.rate) {
      this.panel.show(IDLE);
      this.panel.tell("recording_too_short");
      return;
    }
    this.panel.show(UNDERSTANDING);
    await this.#understand(await recordingOf(blocks, microphone.rate), "question.wav");
  }

  #discard() {
    this.leaving?.abort();
    this.recording?.microphone.close();
    this.opening = this.recording = this.leaving = null;
    if (!this.handsFree.isOn && this.panel.state !== IDLE) {
      this.panel.show(IDLE);
      this.panel.understood(null);
    }
  }

  /** Understand a recording, and put what was heard where it can be corrected, or ask it. */
  async #understand(recording, name) {
    if (!this.#canHear()) return;
    this.panel.tell(null);
    this.panel.show(UNDERSTANDING);
    const mine = (this.leaving = new AbortController());
    try {
      const text = await heardIn(recording, name, { onHeard: (so) => this.panel.understood(so), signal: mine.signal });
      if (this.leaving !== mine) return;
      this.leaving = null;
      this.panel.understood(this.mode === "voice" ? text : null, true);
      this.panel.show(IDLE);
      await this.#put(text);
    } catch (error) {
      if (this.leaving !== mine) return;
      this.leaving = null;
      this.panel.understood(null);
      this.panel.show(IDLE);
      this.#failed(error);
    }
  }

  async #put(text) {
    if (this.panel.atOnce.checked) await this.#ask(text);
    else {
      this.composer.insert(text);
      this.composer.focus();
    }
  }

  /** Ask a text with what else stands in the composer; returns when the answer is written. */
  async #ask(text) {
    await this.#untilIdle();
    this.composer.insert(text);
    await this.composer.send();
  }

  /** End the answer that is being written, if one is, and wait until it has ended. */
  async #untilIdle() {
    const { chat } = this;
    if (!chat.busy) return;
    const idle = new Promise((resolve) => {
      const off = chat.on(() => {
        if (chat.busy) return;
        off();
        resolve();
      });
    });
    await chat.stop();
    await idle;
  }

  #failed(error) {
    if (error instanceof MicrophoneError || error.key === "microphone_lost") this.panel.tell(error.key);
    else if (error instanceof ApiError && error.key === "nothing_heard") this.panel.tell(error.key);
    else tell(error);
  }

  /** What keeps the voice from being used here at all, told where it is meant to be used. */
  #notice() {
    if (this.mode !== "voice") return this.panel.tell(null);
    const { can, model } = site();
    if (!can.hear && model.state !== "loading") return this.panel.tell("no_speech_model");
    return this.panel.tell(can.speak ? null : "no_voice");
  }

  // -- the spoken answer ----------------------------------------------------------------------------

  #hear(kind, detail) {
    const { chat, speaker } = this;
    if (kind === "opened") {
      speaker.forget();
      this.panel.understood(null);
    } else if (kind === "text") speaker.feed(detail.text);
    else if (kind === "busy" && chat.busy && !chat.answer.text && this.#isSpoken()) speaker.begin();
    else if (kind === "busy" && !chat.busy) {
      const last = chat.turns.at(-1);
      if (last?.note?.reason === "cancelled") speaker.stop();
      else speaker.end(last?.role === "assistant" ? last.text : "");
    }
  }

  #isSpoken() {
    return site().can.speak && (this.mode === "voice" || settings().aloud);
  }

  #spoken() {
    const { speaker, handsFree, panel } = this;
    const { speaking, audible, sentence } = speaker;
    if (audible) {
      this.audibleUntil = Infinity;
      handsFree.sounds();
    } else if (!speaking) this.audibleUntil = performance.now() + ECHO;
    const isShown = this.mode !== "hidden" && (speaking || speaker.kept);
    panel.spoken({ isShown, isSpeaking: speaking, sentence: audible ? sentence : "" });
    if (audible && !this.swinging) this.#swing();
  }

  /** Let the ring show how loud the voice is, while it is heard. */
  #swing() {
    const samples = this.speaker.now();
    this.swinging = samples !== null;
    if (!samples) return this.panel.level(0);
    if (this.handsFree.isOn) this.panel.level(share(decibels(samples)));
    return requestAnimationFrame(() => this.#swing());
  }

  // -- without hands ----------------------------------------------------------------------------------

  async #toggleHandsFree() {
    if (this.handsFree.isOn) {
      this.handsFree.end();
      this.speaker.stop();
      return;
    }
    if (!this.#canHear()) return;
    this.speaker.stop();
    this.panel.understood(null);
    this.#notice();
    try {
      await this.handsFree.start();
    } catch (error) {
      this.#failed(error);
    }
  }

  #showHandsFree(state) {
    this.panel.show(state === OFF ? IDLE : state);
    if (state === HEARING) this.#notice();
    if (state === THINKING || state === OFF) this.panel.level(0);
  }

  /** One turn: understood, asked, answered, spoken to its end. */
  async #turn(recording, signal, asked) {
    let text;
    try {
      text = await heardIn(recording, "question.wav", { onHeard: (so) => this.panel.understood(so), signal });
    } catch (error) {
      if (error.key === "nothing_heard") return; // a noise: it goes on listening
      throw error;
    }
    if (signal.aborted) return;
    this.panel.understood(null); // it stands in the transcript now
    asked();
    await this.#ask(text);
    await this.speaker.silence();
  }

  #interrupt() {
    this.speaker.stop();
    this.chat.stop().catch(tell);
  }

  // -- keys ---------------------------------------------------------------------------------------------

  #key(event) {
    if (this.mode === "hidden" || event.defaultPrevented || document.querySelector("dialog[open], .menu")) return;
    if (event.key === "Escape") this.#escape(event);
    const isOurs = event.target === this.panel.orb || !event.target.closest(TAKES_SPACES);
    if (event.code !== "Space" || this.mode !== "voice" || !isOurs || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!event.repeat) this.#press();
  }

  #keyUp(event) {
    if (event.code !== "Space" || this.mode === "hidden") return;
    if (event.target === this.panel.orb) event.preventDefault(); // or it would be pressed once more
    this.#release();
  }

  #escape(event) {
    if (this.handsFree.isOn) this.#toggleHandsFree();
    else if (this.panel.state !== IDLE) this.#discard();
    else if (this.speaker.speaking) this.speaker.stop();
    else return;
    event.preventDefault();
  }
}
