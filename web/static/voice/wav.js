// Samples as a WAV file, which every server reads without more than its own means.

const HEADER = 44; // bytes

/** Float32 samples from -1 to 1, mono, as a Blob of 16-bit PCM. */
export function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(HEADER + 2 * samples.length));
  const name = (at, text) => [...text].forEach((letter, place) => view.setUint8(at + place, letter.charCodeAt(0)));
  name(0, "RIFF");
  view.setUint32(4, HEADER - 8 + 2 * samples.length, true);
  name(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of the format
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channel
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); // bytes a second
  view.setUint16(32, 2, true); // bytes of a sample
  view.setUint16(34, 16, true); // bits
  name(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  for (let at = 0; at < samples.length; at++) {
    view.setInt16(HEADER + 2 * at, Math.round(32767 * Math.max(-1, Math.min(1, samples[at]))), true);
  }
  return new Blob([view], { type: "audio/wav" });
}

/** Several Float32Arrays as one. */
export function joined(parts) {
  const whole = new Float32Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
