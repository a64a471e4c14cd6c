// What is seen of the voice: above the composer, and in it the microphone.

import { button, fill, h, icon, iconButton } from "../core/dom.js";
import { say } from "../core/texts.js";
import { decibels, Meter, share } from "./levels.js";

export const IDLE = "idle";
export const RECORDING = "recording";
export const UNDERSTANDING = "understanding";

// What the large button shows and is called, and the line below it, in each state.
const STATES = {
  idle: { drawing: "microphone", name: "record_question", line: "voice_idle", touched: "voice_idle_touch" },
  opening: { drawing: "microphone", name: "finish_recording", line: "voice_opening" },
  recording: { drawing: "stop", name: "finish_recording", line: "voice_recording" },
  understanding: { drawing: "close", name: "discard_recording", line: "voice_understanding" },
  listening: { drawing: "microphone", name: "end_hands_free", line: "voice_listening" },
  hearing: { drawing: "microphone", name: "end_hands_free", line: "voice_hearing" },
  thinking: { drawing: "microphone", name: "end_hands_free", line: "voice_thinking" },
  speaking: { drawing: "speaker", name: "end_hands_free", line: "voice_speaking" },
};
const HANDS_FREE = ["listening", "hearing", "thinking", "speaking"];

export class Panel {
  /** `act`: what the buttons do, by their names. */
  constructor(element, act) {
    this.element = element;
    this.line = h("p", { class: "voice-line", role: "status", "aria-live": "polite" });
    this.orb = h("button", { type: "button", class: "orb", id: "record" });
    this.small = iconButton("microphone", "record_question", () => {}, { class: "microphone", id: "microphone" });
    for (const one of [this.orb, this.small]) pressed(one, act);
    this.canvas = h("canvas", { class: "levels", "aria-hidden": "true" });
    this.meter = new Meter(this.canvas);
    this.time = h("span", { class: "time", role: "timer" }, "0:00");
    this.done = button("finish", act.finish, { kind: "primary", drawing: "check", class: "finish" });
    this.discard = iconButton("remove", "discard_recording", act.discard);
    const lamp = h("span", { class: "lamp", "aria-hidden": "true" });
    this.strip = h("div", { class: "strip", hidden: true }, lamp, this.time, this.canvas, this.discard, this.done);
    this.words = h("p", { class: "heard-words" });
    this.heard = h("section", { class: "heard", id: "heard", hidden: true }, h("h2", { say: "heard" }), this.words);
    this.atOnce = h("input", { type: "checkbox", id: "ask-at-once" });
    this.atOnce.addEventListener("change", () => act.choose(this.atOnce.checked));
    this.choice = h("label", { class: "at-once" }, this.atOnce, h("span", { say: "ask_at_once" }));
    const sounds = "audio/*,.wav,.webm,.m4a,.opus";
    this.chooser = h("input", { type: "file", accept: sounds, id: "recording-file", hidden: true });
    this.chooser.addEventListener("change", () => {
      const [file] = this.chooser.files;
      this.chooser.value = "";
      if (file) act.upload(file);
    });
    this.uploader = button("upload_recording", () => this.chooser.click(), { drawing: "upload", class: "side-button" });
    const hands = { drawing: "voice", class: "side-button", "aria-pressed": "false", id: "hands-free" };
    this.hands = button("hands_free", act.handsFree, hands);
    const left = h("span", { class: "stage-side" }, this.uploader, this.chooser);
    this.stage = h("div", { class: "stage" }, left, this.orb, h("span", { class: "stage-side" }, this.hands));
    this.notice = h("p", { class: "voice-notice", role: "alert", hidden: true });
    this.#makePlayer(act);
    const foot = h("div", { class: "voice-foot" }, this.line, this.choice);
    fill(element, this.notice, this.heard, this.player, this.strip, this.stage, foot);
    this.show(IDLE);
  }

  #makePlayer(act) {
    this.playing = iconButton("play", "play_again", act.play, { class: "play" });
    this.sentence = h("p", { class: "sentence" });
    this.player = h(
      "section",
      { class: "player", id: "spoken-answer", label: "spoken_answer", hidden: true },
      this.playing,
      this.sentence,
      iconButton("download", "download_spoken", act.download, { class: "download" }),
      iconButton("close", "close", act.dismiss),
    );
  }

  /** Show a state; see `STATES`. */
  show(state) {
    this.state = state;
    const { drawing, name, line, touched = line } = STATES[state];
    const isHandsFree = HANDS_FREE.includes(state);
    this.element.dataset.state = state;
    say(this.line, { content: matchMedia("(pointer: coarse)").matches ? touched : line });
    fill(this.orb, icon(drawing));
    say(this.orb, { label: name, title: name });
    const isRecording = state === RECORDING || state === "opening";
    fill(this.small, icon(isRecording ? "stop" : "microphone"));
    const small = isRecording ? "finish_recording" : "record_question";
    say(this.small, { label: small, title: small });
    this.small.classList.toggle("on", isRecording);
    this.small.disabled = isHandsFree || state === UNDERSTANDING;
    this.strip.hidden = !(isRecording || isHandsFree || state === UNDERSTANDING);
    this.time.hidden = this.done.hidden = !isRecording;
    this.discard.hidden = isHandsFree;
    this.uploader.disabled = state !== IDLE;
    this.hands.setAttribute("aria-pressed", String(isHandsFree));
    say(this.hands.lastChild, { content: isHandsFree ? "end_hands_free" : "hands_free" });
    this.hands.disabled = !isHandsFree && state !== IDLE;
    if (!this.strip.hidden && !isHandsFree && !isRecording) this.level(0);
    if (state === "opening" || state === IDLE) this.meter.clear();
    else this.meter.draw(); // its place may be wider now
  }

  /** What the microphone gives at this moment. */
  hear(samples) {
    const level = decibels(samples);
    this.meter.add(level);
    this.level(share(level));
  }

  /** How far the ring around the large button reaches, from 0 to 1. */
  level(part) {
    this.element.style.setProperty("--level", part.toFixed(3));
  }

  /** Seconds of the recording so far. */
  lasts(seconds) {
    const whole = Math.floor(seconds);
    const text = `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
    if (this.time.textContent !== text) this.time.textContent = text;
  }

  /** What was understood; `isWhole` says that nothing more comes, null hides it. */
  understood(text, isWhole = false) {
    this.heard.hidden = text === null;
    this.words.textContent = text ?? "";
    this.heard.classList.toggle("growing", !isWhole);
  }

  /** A text, a key or [key, values], that stays until another one or null. */
  tell(text) {
    this.notice.hidden = text === null;
    if (text !== null) say(this.notice, { content: text });
  }

  /** The spoken answer: whether it is heard, and the sentence. */
  spoken({ isShown, isSpeaking, sentence }) {
    this.player.hidden = !isShown;
    this.player.classList.toggle("sounding", isSpeaking);
    const name = isSpeaking ? "stop_speaking" : "play_again";
    fill(this.playing, icon(isSpeaking ? "stop" : "play"));
    say(this.playing, { label: name, title: name });
    if (isSpeaking && sentence) this.sentence.textContent = sentence;
    else say(this.sentence, { content: isSpeaking ? "about_to_speak" : "spoken_answer" });
  }
}

/** Have a button begin when it is pressed, and end when it is let go after it was held. */
function pressed(element, act) {
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || element.disabled) return;
    element.setPointerCapture(event.pointerId);
    act.press();
  });
  for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, () => act.release());
  element.addEventListener("click", (event) => event.detail === 0 && act.press()); // by keyboard or a screen reader
  element.addEventListener("contextmenu", (event) => event.preventDefault()); // of a finger that rests
}
