// A conversation without hands: listens until silence, asks, lets the answer be spoken, listens again;
// whoever speaks meanwhile interrupts.

import { Activity, OVER_OWN_VOICE, SPEECH } from "./levels.js";
import { openMicrophone, recordingOf } from "./recorder.js";

export const OFF = "off";
export const LISTENING = "listening"; // nobody speaks
export const HEARING = "hearing"; // somebody speaks
export const THINKING = "thinking"; // what was said is understood, asked, and answered
export const SPEAKING = "speaking"; // the answer is heard

export class HandsFree {
  /**
   * `turn(recording, signal, asked)` understands a recording, calls `asked` when it asks, and returns
   * when the answer is written and spoken. `interrupt` ends an answer at once; `isAudible` says whether
   * one is heard. `onState` is called after each change of `state`, `onBlock` with all that is heard,
   * `onError` with what a turn failed with, or the microphone: "microphone_lost" as its `key`.
   */
  constructor(given) {
    Object.assign(this, given);
    this.state = OFF;
    this.microphone = null;
    this.current = null;
    this.unasked = []; // what was said and not asked yet
  }

  get isOn() {
    return this.state !== OFF;
  }

  /** Throws `MicrophoneError`. */
  async start() {
    if (this.isOn) return;
    this.#set(LISTENING);
    try {
      const microphone = await openMicrophone(
        (samples) => this.#hear(samples),
        () => this.#lost(),
      );
      if (!this.isOn) {
        microphone.close(); // ended before it was open
        return;
      }
      this.activity = new Activity(microphone.rate);
      this.microphone = microphone;
    } catch (error) {
      this.#set(OFF);
      throw error;
    }
  }

  /** Listen no more. An answer goes on being written. */
  end() {
    if (!this.isOn) return;
    this.microphone?.close();
    this.microphone = null;
    this.current?.leaving.abort();
    this.current = null;
    this.unasked = [];
    this.#set(OFF);
  }

  /** An answer begins to be heard. */
  sounds() {
    if (this.state === THINKING) this.#set(SPEAKING);
  }

  #lost() {
    this.end();
    this.onError({ key: "microphone_lost" });
  }

  #hear(samples) {
    if (!this.microphone) return;
    this.onBlock(samples);
    const event = this.activity.feed(samples, this.isAudible() ? OVER_OWN_VOICE : SPEECH);
    if (event === "begin") {
      this.#leave();
      this.#set(HEARING);
    } else if (event === "end") {
      this.unasked.push(...this.activity.take());
      this.#ask();
    } else if (event === "dropped") {
      if (this.unasked.length) this.#ask();
      else this.#set(LISTENING);
    }
  }

  /** Give up the turn that is under way; what was not asked yet is asked with what follows. */
  #leave() {
    const { current } = this;
    if (!current) return;
    this.current = null;
    current.leaving.abort();
    if (current.asked) this.interrupt();
    else this.unasked = current.blocks;
  }

  async #ask() {
    const mine = { leaving: new AbortController(), blocks: this.unasked, asked: false };
    this.unasked = [];
    this.current = mine;
    this.#set(THINKING);
    try {
      const recording = await recordingOf(mine.blocks, this.microphone.rate);
      if (this.current !== mine) return;
      await this.turn(recording, mine.leaving.signal, () => (mine.asked = true));
    } catch (error) {
      if (this.current === mine) this.onError(error);
    }
    if (this.current !== mine) return; // interrupted, or ended
    this.current = null;
    this.#set(LISTENING);
  }

  #set(state) {
    if (state === this.state) return;
    this.state = state;
    this.onState(state);
  }
}
