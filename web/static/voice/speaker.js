// Answers spoken, sentence by sentence while they are still being written.

import { blob } from "../core/api.js";
import { language } from "../core/texts.js";
import { site } from "../core/model.js";
import { audio, hold } from "./recorder.js";
import { languageOf, Sentences } from "./sentences.js";
import { joined, wav } from "./wav.js";

const AHEAD = 2; // sentences that are fetched while one is heard

/** One voice: `onChange` is called when it begins, goes to the next sentence, ends, or fails. */
export class Speaker {
  constructor(onChange, onError) {
    Object.assign(this, { onChange, onError });
    this.turn = null;
    this.meter = null;
    this.sounding = null;
  }

  /** Whether something is heard, or will be as soon as it has come. */
  get speaking() {
    return this.turn !== null && this.turn.alive;
  }

  /** Whether sound comes out at this moment. */
  get audible() {
    return this.sounding !== null;
  }

  /** The sentence that is heard. */
  get sentence() {
    return this.turn?.entries[this.turn.at]?.text ?? "";
  }

  /** Whether there is an answer that can be heard again. */
  get kept() {
    return Boolean(this.turn?.entries.some((entry) => entry.buffer));
  }

  /** An answer begins; what was being said ends. To be called within a press, as browsers want it. */
  begin() {
    this.stop();
    this.#start({ sentences: new Sentences(), entries: [], whole: false });
  }

  #start(given) {
    const release = hold();
    this.turn = { ...given, at: 0, alive: true, leaving: new AbortController(), more: bell() };
    this.turn.silence = this.#play(this.turn).finally(release);
  }

  /** Returns when the answer is spoken to its end, or was stopped. */
  async silence() {
    await this.turn?.silence;
  }

  /** Be silent, and keep nothing. */
  forget() {
    this.stop();
    this.turn = null;
    this.onChange();
  }

  /** The answer so far. */
  feed(text) {
    const { turn } = this;
    if (turn?.alive && !turn.whole) this.#add(turn, text, turn.sentences.take(text, spokenIn(text)));
  }

  /** The whole answer. */
  end(text) {
    const { turn } = this;
    if (!turn?.alive || turn.whole) return;
    turn.whole = true;
    this.#add(turn, text, turn.sentences.rest(text, spokenIn(text)));
  }

  /** Be silent at once. What was already spoken can be heard again. */
  stop() {
    const { turn } = this;
    if (!turn?.alive) return;
    turn.alive = false;
    turn.leaving.abort();
    turn.more.ring();
    this.#silence();
    this.onChange();
  }

  /** Say again what was said. */
  again() {
    if (!this.kept) return;
    this.stop();
    this.#start({ entries: this.turn.entries.filter((entry) => entry.buffer), whole: true });
  }

  /** All that was said, as a WAV. */
  recording() {
    const buffers = this.turn.entries.map((entry) => entry.buffer).filter(Boolean);
    return wav(joined(buffers.map((buffer) => buffer.getChannelData(0))), buffers[0].sampleRate);
  }

  #add(turn, text, sentences) {
    for (const sentence of sentences) turn.entries.push({ text: sentence, language: spokenIn(text), buffer: null, sound: null });
    turn.more.ring();
  }

  async #play(turn) {
    try {
      while (turn.alive) {
        if (turn.at >= turn.entries.length) {
          if (turn.whole) break;
          await turn.more.rung();
          continue;
        }
        for (const entry of turn.entries.slice(turn.at, turn.at + 1 + AHEAD)) this.#fetch(turn, entry);
        const buffer = await this.#arrived(turn, turn.entries[turn.at]);
        if (!turn.alive) return;
        if (buffer) await this.#sound(buffer);
        if (turn.alive) turn.at += 1;
      }
    } catch (error) {
      if (turn.alive && error.name !== "AbortError") this.onError(error);
    } finally {
      if (turn.alive) {
        turn.alive = false;
        this.onChange();
      }
    }
  }

  /** The sound of a sentence; null for one that the voice refuses, which is told once. */
  async #arrived(turn, entry) {
    try {
      return await entry.sound;
    } catch (error) {
      if (error.status !== 400) throw error;
      if (!turn.isRefused) this.onError(error);
      turn.isRefused = true;
      return null;
    }
  }

  #fetch(turn, entry) {
    entry.sound ??= (async () => {
      const { signal: leaving } = turn.leaving;
      const file = await blob("POST", "speak", { text: entry.text, language: entry.language }, { signal: leaving });
      entry.buffer = await audio().decodeAudioData(await file.arrayBuffer());
      return entry.buffer;
    })();
    entry.sound.catch(() => {}); // told where it is waited for
  }

  #sound(buffer) {
    const context = audio();
    this.meter ??= new AnalyserNode(context, { fftSize: 512 });
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(this.meter).connect(context.destination);
    return new Promise((resolve) => {
      source.onended = resolve;
      this.sounding = { source, resolve };
      source.start();
      this.onChange();
    }).finally(() => {
      if (this.sounding?.source === source) this.sounding = null;
    });
  }

  #silence() {
    const { sounding } = this;
    if (!sounding) return;
    this.sounding = null;
    sounding.source.stop();
    sounding.source.disconnect();
    sounding.resolve();
  }

  /** How loud the voice is at this moment: samples as they sound. */
  now() {
    if (!this.sounding || !this.meter) return null;
    const samples = new Float32Array(this.meter.fftSize);
    this.meter.getFloatTimeDomainData(samples);
    return samples;
  }
}

/** A bell that one waits for: `rung` resolves at the next `ring`, or at once if it rang since the last. */
function bell() {
  let waiting = null;
  let rang = false;
  return {
    ring() {
      rang = true;
      waiting?.();
    },
    async rung() {
      if (!rang) await new Promise((resolve) => (waiting = resolve));
      rang = false;
      waiting = null;
    },
  };
}

/** In which language an answer is to be spoken. */
function spokenIn(text) {
  return languageOf(text, site().model.knows === "tiny" ? "en" : language());
}
