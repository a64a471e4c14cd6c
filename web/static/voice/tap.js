// Runs in the browser's audio thread: hands on what a microphone gives, a block at a time.

const BLOCK = 1024; // samples, about 20 ms: short enough to react to, long enough not to flood the page

class Tap extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
  }

  process([input]) {
    const samples = input[0];
    if (!samples) return true; // nothing is connected at this moment
    for (let at = 0; at < samples.length; ) {
      const part = samples.subarray(at, at + BLOCK - this.filled);
      this.block.set(part, this.filled);
      this.filled += part.length;
      at += part.length;
      if (this.filled === BLOCK) {
        this.port.postMessage(this.block, [this.block.buffer]);
        this.block = new Float32Array(BLOCK);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("phisight-tap", Tap);
