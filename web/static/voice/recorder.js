// The microphone, and recordings of it: 16 kHz mono WAV, made here, because what browsers record by
// themselves (WebM, MP4) needs a decoder that a server may lack.

import { site } from "../core/model.js";
import { joined, wav } from "./wav.js";

export const RATE = 16_000; // Hz, at which Whisper listens
const TAP = new URL("./tap.js", import.meta.url);
const WANTED = {
  echoCancellation: true, // the page must not hear its own voice
  noiseSuppression: true,
  autoGainControl: true, // who sits far away is heard too
  channelCount: 1,
};
const REASONS = {
  NotAllowedError: "microphone_denied",
  SecurityError: "microphone_denied",
  NotFoundError: "microphone_absent",
  OverconstrainedError: "microphone_absent",
  NotReadableError: "microphone_busy",
  AbortError: "microphone_busy",
};

/** There is no sound of a microphone; `key` of web/texts says why. */
export class MicrophoneError extends Error {
  constructor(key) {
    super(key);
    this.key = key;
  }
}

const RESTS_AFTER = 2000; // milliseconds without use, after which the machine's sound may sleep

let context = null;
let ready = null;
let uses = 0;

/** The page's one AudioContext. It is awake only while `hold` is asked for. */
export const audio = () => (context ??= new AudioContext());

/** Have sound go in or out, from within a press; returns what ends that. */
export function hold() {
  uses += 1;
  wake();
  let isHeld = true;
  return () => {
    if (!isHeld) return;
    isHeld = false;
    uses -= 1;
    setTimeout(() => uses || settle(audio().suspend()), RESTS_AFTER);
  };
}

const wake = () => uses && settle(audio().resume());
const settle = (promise) => promise.catch((error) => console.debug("audio:", error.message));

// Browsers let a page sound only after a press; on a touch screen its end counts, not its beginning.
for (const pressed of ["pointerup", "keydown"]) addEventListener(pressed, wake, true);

/**
 * Open the microphone; `onBlock` gets Float32 samples, about 20 ms at a time, and `onLost` is called
 * when it goes away. Returns {rate, close}. Throws `MicrophoneError`.
 */
export async function openMicrophone(onBlock, onLost = () => {}) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new MicrophoneError(isSecureContext ? "microphone_absent" : "microphone_insecure");
  }
  const release = hold();
  const sound = audio();
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: WANTED });
  } catch (error) {
    release();
    throw new MicrophoneError(REASONS[error.name] ?? "microphone_failed");
  }
  const stop = () => {
    stream.getTracks().forEach((track) => track.stop());
    release();
  };
  try {
    ready ??= sound.audioWorklet.addModule(TAP);
    await ready;
  } catch {
    ready = null;
    stop();
    throw new MicrophoneError("microphone_failed");
  }
  const source = sound.createMediaStreamSource(stream);
  const tap = new AudioWorkletNode(sound, "phisight-tap", { channelCount: 1, channelCountMode: "explicit" });
  tap.port.onmessage = ({ data }) => onBlock(data);
  source.connect(tap).connect(sound.destination); // it gives silence; what leads nowhere is not run
  stream.getTracks().forEach((track) => track.addEventListener("ended", onLost));
  return {
    rate: sound.sampleRate,
    close() {
      tap.port.onmessage = null;
      source.disconnect();
      tap.disconnect();
      stop();
    },
  };
}

/** Seconds of a recording that the server still takes. */
export const longestRecording = () => Math.floor(site().limits.upload / (2 * RATE)) - 1;

/** Blocks of samples at a rate as a WAV of 16 kHz. */
export async function recordingOf(blocks, rate) {
  const samples = joined(blocks);
  if (rate === RATE || !samples.length) return wav(samples, RATE);
  const length = Math.max(1, Math.round((samples.length * RATE) / rate));
  const offline = new OfflineAudioContext(1, length, RATE);
  const buffer = offline.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = offline.createBufferSource();
  source.buffer = buffer;
  source.connect(offline.destination);
  source.start();
  return wav((await offline.startRendering()).getChannelData(0), RATE);
}
