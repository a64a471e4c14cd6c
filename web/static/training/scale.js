// The numbers behind a chart: axes, ticks, smoothing, paths. Nothing here touches the page.

import { language, number } from "../core/texts.js";

/** From a value to a place on an axis, and back. Logarithmic where `isLog`. */
export function scale([low, high], [start, end], isLog = false) {
  const to = isLog ? Math.log10 : (value) => value;
  const from = isLog ? (value) => 10 ** value : (value) => value;
  const [a, b] = [to(low), to(high)];
  const place = (value) => start + ((to(value) - a) / (b - a)) * (end - start);
  place.back = (at) => from(a + ((at - start) / (end - start)) * (b - a));
  return place;
}

/** Round numbers from at or below `low` to at or above `high`, about `most` of them. */
export function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  const first = Math.floor(low / gap + 1e-9);
  const count = Math.ceil(high / gap - 1e-9) - first;
  return Array.from({ length: count + 1 }, (_, index) => Number(((first + index) * gap).toPrecision(12)));
}

/** Powers of ten between two positive values, with 2 and 5 times them where those are few. */
export function logTicks(low, high) {
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const factors = to - from > 3 ? [1] : [1, 2, 5];
  const found = [];
  for (let power = from; power <= to; power++) {
    for (const factor of factors) {
      const value = Number(`${factor}e${power}`);
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 1 ? found : [low, high];
}

/** What an axis covers so that all values are on it; wide enough for one value, or none. */
export function range(values, { floor = null, ceiling = null, isLog = false } = {}) {
  const fit = isLog ? values.filter((value) => value > 0) : values;
  if (!fit.length) return isLog ? [0.1, 1] : [floor ?? 0, ceiling ?? 1];
  let [low, high] = [Infinity, -Infinity];
  for (const value of fit) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (isLog) return high / low < 1.1 ? [low / 2, high * 2] : [low * 0.9, high * 1.1];
  if (floor !== null) low = Math.min(low, floor);
  if (ceiling !== null) high = Math.max(high, ceiling);
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
    const margin = Math.abs(low) * 0.1 || 1;
    [low, high] = [low - margin, high + margin];
  }
  return [low, high];
}

/** Exponential moving average, free of the pull of its first value. */
export function smoothed(points, factor) {
  if (!factor) return points;
  let [mean, weight] = [0, 0];
  return points.map(([step, value]) => {
    mean = factor * mean + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return [step, mean / weight];
  });
}

/** The index of the point whose step is nearest. `points` are in the order of their steps. */
export function nearest(points, step) {
  const after = firstFrom(points, step);
  if (after === 0) return 0;
  if (after === points.length) return points.length - 1;
  return step - points[after - 1][0] <= points[after][0] - step ? after - 1 : after;
}

/** The index of the first point of a step or a later one. */
export function firstFrom(points, step) {
  let [low, high] = [0, points.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The points in sight, with a neighbour on both sides so that lines go on to the edge. */
export function inSight(points, [low, high]) {
  return points.slice(Math.max(0, firstFrom(points, low) - 1), firstFrom(points, high) + 2);
}

/** A path through points; what has no place on the axis, as 0 on a logarithmic one, is a gap. */
export function pathOf(points, x, y) {
  let [text, pen] = ["", "M"];
  for (const [step, value] of points) {
    const [left, top] = [x(step), y(value)];
    if (Number.isFinite(top)) {
      text += `${pen}${left.toFixed(1)} ${top.toFixed(1)}`;
      pen = "L";
    } else pen = "M";
  }
  return text;
}

/** A value for people: as many digits as tell something. */
export function figure(value) {
  const size = Math.abs(value);
  if (size >= 1000) return number(value, 0);
  if (size !== 0 && size < 0.001) {
    return new Intl.NumberFormat(language(), { notation: "scientific", maximumSignificantDigits: 3 }).format(value);
  }
  return new Intl.NumberFormat(language(), { maximumSignificantDigits: 4 }).format(value);
}

/** Labels of ticks, which all have as many digits as the finest of them needs. */
export function tickLabels(values) {
  const largest = Math.max(...values.map(Math.abs));
  if (largest < 0.001 && largest > 0) return values.map((value) => (value ? figure(value) : "0"));
  const digits = Math.max(...values.map((value) => String(Number(value.toPrecision(6))).split(".")[1]?.length ?? 0));
  return values.map((value) => number(value, Math.min(digits, 6)));
}
