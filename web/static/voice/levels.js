// How loud it is, whether somebody speaks, and how both are shown.

const SILENT = -100; // dB: digital silence has no logarithm

/** The level of samples from -1 to 1, in dB below full scale. */
export function decibels(samples) {
  let power = 0;
  for (const sample of samples) power += sample * sample;
  return Math.max(SILENT, 10 * Math.log10(power / samples.length + 1e-12));
}

/** A level as a share of what a meter shows: nothing at -60 dB, all at -10. */
export const share = (level) => Math.max(0, Math.min(1, (level + 60) / 50));

export const SPEECH = {
  // The quietest moment of so many seconds is the room's own noise: nobody speaks longer without a
  // breath, and a noise that stays becomes part of the room (Martin 2001, minimum statistics).
  floorSeconds: 4,
  // Levels are smoothed over so long, that the gaps between two sound waves are none in speech.
  smoothSeconds: 0.04,
  // dB above the floor at which speech begins, and under which it pauses. Speech in a quiet room is
  // 30 dB above it; two thresholds, so that a word that fades does not flicker.
  begin: 12,
  pause: 7,
  // dB below full scale: whatever is quieter is nothing, since noise suppression leaves pure silence.
  quietest: -52,
  // A key, a click or a cup is shorter than this, a vowel is longer.
  beginSeconds: 0.12,
  // Kept from before the beginning: the consonant that was not loud yet.
  beforeSeconds: 0.4,
  // Between two sentences people pause up to about a second.
  silenceSeconds: 1.2,
  // Speech of less than this, altogether, was a cough.
  shortestSeconds: 0.25,
  // A minute is more than a question; what goes on and on is a radio.
  longestSeconds: 60,
};

// While the page itself speaks, what is left of its echo must not count as somebody's speech.
export const OVER_OWN_VOICE = { ...SPEECH, begin: 18, beginSeconds: 0.3 };

/**
 * Tells of speech in blocks of samples. `feed` returns "begin" when somebody has begun to speak, "end"
 * when he has come to an end, "dropped" when it was too short to be speech, else "".
 */
export class Activity {
  constructor(rate) {
    this.rate = rate;
    this.level = SILENT;
    this.minima = []; // [level, seconds] of the last `floorSeconds`, in parts of half a second
    this.blocks = [];
    this.quiet = null;
  }

  get floor() {
    return Math.min(...this.minima.map(([level]) => level), 0);
  }

  get speaking() {
    return this.quiet !== null;
  }

  feed(samples, limits = SPEECH) {
    const seconds = samples.length / this.rate;
    const now = decibels(samples);
    const weight = 1 - Math.exp(-seconds / limits.smoothSeconds);
    this.level = this.level === SILENT ? now : this.level + weight * (now - this.level);
    this.#note(seconds, limits);
    this.blocks.push(samples);
    const over = (threshold) => this.level > Math.max(this.floor + threshold, limits.quietest);
    return this.speaking ? this.#goOn(over(limits.pause), seconds, limits) : this.#wait(over(limits.begin), seconds, limits);
  }

  /** The samples of the speech that ended or goes on, with what came just before it. */
  take() {
    const blocks = this.blocks;
    this.reset();
    return blocks;
  }

  /** Forget what was said, but not how loud the room is. */
  reset() {
    this.blocks = [];
    this.quiet = null;
    this.voiced = 0;
  }

  #note(seconds, limits) {
    const last = this.minima.at(-1);
    if (!last || last[1] >= 0.5) this.minima.push([this.level, seconds]);
    else {
      last[0] = Math.min(last[0], this.level);
      last[1] += seconds;
    }
    while (this.minima.length > 2 * limits.floorSeconds) this.minima.shift();
  }

  #wait(loud, seconds, limits) {
    this.voiced = loud ? (this.voiced ?? 0) + seconds : 0;
    if (this.voiced >= limits.beginSeconds) {
      this.quiet = 0;
      this.lasted = 0;
      return "begin";
    }
    const kept = Math.ceil((limits.beforeSeconds + limits.beginSeconds) / seconds);
    while (this.blocks.length > kept) this.blocks.shift();
    return "";
  }

  #goOn(loud, seconds, limits) {
    this.quiet = loud ? 0 : this.quiet + seconds;
    this.lasted += seconds;
    if (loud) this.voiced += seconds;
    if (this.quiet < limits.silenceSeconds && this.lasted < limits.longestSeconds) return "";
    if (this.voiced >= limits.shortestSeconds) return "end";
    this.reset();
    return "dropped";
  }
}

const MOST = 90; // bars
const EACH = 7; // pixels of the page, with the gap after it

/** The levels of the last seconds as bars that move to the left, in the colour of the element's text. */
export class Meter {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
  }

  add(level) {
    this.loudest = Math.max(this.loudest, share(level));
    this.count += 1;
    if (this.count % 2) return; // fifty blocks a second are more than one sees
    this.levels.push(this.loudest);
    if (this.levels.length > MOST) this.levels.shift();
    this.loudest = 0;
    this.draw();
  }

  clear() {
    this.levels = [];
    this.loudest = this.count = 0;
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const pen = canvas.getContext("2d");
    const scale = devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = getComputedStyle(canvas).color;
    const bars = Math.min(MOST, Math.floor(canvas.clientWidth / EACH));
    const step = width / bars;
    for (let bar = 0; bar < bars; bar++) {
      const loud = this.levels[this.levels.length - bars + bar] ?? 0;
      const tall = Math.max(0.5 * step, loud * height * 0.94);
      pen.beginPath();
      pen.roundRect(bar * step + step * 0.25, (height - tall) / 2, step * 0.5, tall, step / 4);
      pen.fill();
    }
  }
}
