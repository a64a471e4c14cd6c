// A batch under way: some pictures are sent while others are asked about.

import { ApiError, events } from "../core/api.js";

const SENT_AT_ONCE = 4;
const FEW = 8; // the server answers so many side by side: fewer wait for more, if more are coming
const MANY = 64; // of one request
const AHEAD_FILES = 128; // sent or being sent, and not answered yet
const AHEAD_BYTES = 96 * 2 ** 20;
const RECENT = 40; // answers that tell how fast it goes

export class Run {
  #queue = [];
  #next = 0;
  #sending = 0;
  #ready = [];
  #asked = 0;
  #bytes = 0; // of what is ahead
  #waiting = new Set();
  #finished = []; // moments of the last answers, in ms
  #controller = new AbortController();

  /** `onFinish` is called after each row. */
  constructor({ rows, question, settings, sender, onFinish }) {
    Object.assign(this, { question, settings, sender, onFinish });
    this.#finished.push(performance.now());
    this.add(rows);
  }

  /** Ask about more rows. */
  add(rows) {
    this.#queue.push(...rows);
    this.#tell();
  }

  /** Returns when all are answered; throws what makes going on useless, and AbortError when stopped. */
  async go() {
    const { signal } = this.#controller;
    signal.addEventListener("abort", () => this.#tell());
    const touched = this.#queue;
    try {
      await Promise.all([this.#ask(signal), ...Array.from({ length: SENT_AT_ONCE }, () => this.#send(signal))]);
    } finally {
      this.#controller.abort();
      for (const row of touched) if (row.state.kind !== "waiting") row.set({ kind: "waiting" });
    }
  }

  stop() {
    this.#controller.abort();
  }

  /** Seconds that one answer takes, as it went lately; null while nobody knows. */
  pace() {
    const [first, last] = [this.#finished[0], this.#finished.at(-1)];
    return this.#finished.length > 3 ? (last - first) / 1000 / (this.#finished.length - 1) : null;
  }

  get #isMoreComing() {
    return this.#next < this.#queue.length || this.#sending > 0;
  }

  get #isOver() {
    return !this.#isMoreComing && !this.#ready.length && !this.#asked;
  }

  get #isOneToSend() {
    const ahead = this.#sending + this.#ready.length + this.#asked;
    const isRoom = ahead === 0 || (ahead < AHEAD_FILES && this.#bytes < AHEAD_BYTES);
    return isRoom && this.#next < this.#queue.length;
  }

  async #send(signal) {
    for (;;) {
      await this.#until(() => this.#isOneToSend || this.#isOver, signal);
      signal.throwIfAborted();
      if (this.#isOver) return;
      if (!this.#isOneToSend) continue; // another one was quicker
      const row = this.#queue[this.#next++];
      if (row.removed || row.results.has(this.question)) continue;
      this.#sending += 1;
      this.#bytes += row.file.size;
      try {
        row.set({ kind: "sending", share: 0 });
        const onProgress = (share) => row.state.kind === "sending" && row.set({ kind: "sending", share });
        await this.sender.send(row, { signal, onProgress });
        row.set({ kind: "sent", share: 1 });
        this.#ready.push(row);
      } catch (error) {
        if (!(error instanceof ApiError) || isOfAll(error)) throw error;
        const { key, values, text } = error;
        this.#finish(row, { answer: null, error: { key, values, text }, seconds: null });
      } finally {
        this.#sending -= 1;
        this.#tell();
      }
    }
  }

  async #ask(signal) {
    for (;;) {
      await this.#until(() => this.#ready.length >= FEW || !this.#isMoreComing, signal);
      signal.throwIfAborted();
      if (this.#isOver) return;
      const portion = this.#ready.splice(0, MANY);
      if (portion.length) await this.#askAbout(portion, signal);
    }
  }

  async #askAbout(portion, signal) {
    const left = new Map(portion.filter((row) => !row.removed).map((row) => [row.upload, row]));
    for (const row of portion) if (row.removed) this.#bytes -= row.file.size;
    if (!left.size) return this.#tell();
    this.#asked = left.size;
    for (const row of left.values()) row.set({ kind: "asked" });
    const body = { uploads: [...left.keys()], question: this.question, settings: this.settings };
    let whole = false;
    const hear = (name, { upload, answer, error, seconds }) => {
      if (name === "done") whole = true;
      const row = name === "row" && left.get(upload);
      if (!row) return;
      left.delete(upload);
      this.#asked -= 1;
      if (error?.key === "upload_gone" && !row.sentAgain) {
        row.sentAgain = true; // swept meanwhile: sent once more
        row.upload = null;
        this.#bytes -= row.file.size;
        row.set({ kind: "waiting" });
        this.add([row]);
      } else this.#finish(row, { answer, error, seconds });
      this.#tell();
    };
    await events("batches", body, hear, { signal });
    if (!whole || left.size) throw new ApiError(0, { key: "no_connection" });
  }

  #finish(row, result) {
    this.#bytes -= row.file.size;
    row.sentAgain = false;
    row.finish(this.question, result);
    this.#finished.push(performance.now());
    if (this.#finished.length > RECENT) this.#finished.shift();
    this.onFinish();
  }

  async #until(happened, signal) {
    while (!happened() && !signal.aborted) await new Promise((resolve) => this.#waiting.add(resolve));
  }

  #tell() {
    const waiting = [...this.#waiting];
    this.#waiting.clear();
    for (const resolve of waiting) resolve();
  }
}

/** Whether a refusal would meet every other picture too. */
const isOfAll = (error) => error.status === 0 || error.status >= 500 || error.key === "too_many_uploads";
