// An answer that grows, cut into sentences to be spoken one by one; in English, Spanish, German and
// Chinese.

export const LONGEST = 300; // characters: longer sentences are cut, so that speech begins soon

// After these a full stop ends no sentence. In lower case, without the stop.
const SHORTENED = new Set(
  ("mr mrs ms dr prof st jr vs etc eg ie approx fig no vol ca bzw usw evtl ggf inkl nr str tel abb z b d h u a o ä" +
    " sr sra srta ud uds ej pág núm p dña av").split(" "),
);
const WESTERN_END = /[.!?…]+["'”’»)\]]*(?=\s)/gu;
const CHINESE_END = /[。！？；]+["”’」』）]*/gu;
const OPENING = /[\p{Lu}\p{Lt}\p{Lo}\p{N}"'“‘«„¿¡(]/u; // how a sentence begins

/** What a voice should say of an answer's Markdown: its words. Code is not read out. */
export function plain(markdown) {
  return markdown
    .replace(/```[\s\S]*?(```|$)/g, "\n")
    .replace(/!\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/^\s*(\|?\s*:?-{3,}:?\s*)+\|?\s*$/gm, "")
    .replace(/^\s{0,3}(#{1,6}|>|[-*+])\s+/gm, "")
    .replace(/[*`~|]+|(?<!\w)_+|_+(?!\w)/g, (mark) => (mark.includes("|") ? ", " : ""))
    .replace(/https?:\/\/([^\s/]+)\S*/g, "$1");
}

/** Gives every sentence of a growing text once, as soon as it is whole. */
export class Sentences {
  constructor() {
    this.read = 0; // characters of the plain text that were given
  }

  /** The sentences that have become whole; `text` is all so far. */
  take(text, language = "en") {
    return this.#upTo(plain(text), language, false);
  }

  /** What is left of the whole text. */
  rest(text, language = "en") {
    return this.#upTo(plain(text), language, true);
  }

  #upTo(text, language, whole) {
    const given = [];
    for (;;) {
      const left = text.slice(this.read);
      const end = endOfFirst(left, language) || (whole ? left.length : 0);
      if (!end) break;
      this.read += end;
      for (const piece of pieces(left.slice(0, end))) given.push(piece);
    }
    return given;
  }
}

/** How many characters the first sentence has; 0 where it is not known yet. */
export function endOfFirst(text, language) {
  const begun = text.search(/\S/);
  if (begun < 0) return 0;
  const line = text.indexOf("\n", begun); // a line of a list, a heading, a paragraph
  const within = line < 0 ? text : text.slice(0, line + 1);
  for (const match of within.matchAll(CHINESE_END)) {
    const western = endOfWestern(within.slice(0, match.index), language);
    const end = match.index + match[0].length;
    return western || (end < text.length ? end : 0); // a closing quotation mark may follow
  }
  return endOfWestern(within, language) || (line < 0 ? 0 : line + 1);
}

function endOfWestern(text, language) {
  for (const match of text.matchAll(WESTERN_END)) {
    const end = match.index + match[0].length;
    const next = text.slice(end).trimStart()[0];
    if (next === undefined) return text.endsWith("\n") ? end : 0; // what follows decides
    if (endsSentence(text.slice(0, match.index), match[0], next, language)) return end;
  }
  return 0;
}

function endsSentence(before, mark, next, language) {
  if (!OPENING.test(next)) return false;
  if (!mark.startsWith(".") || mark.startsWith("..")) return true;
  const word = before.match(/[\p{L}\p{N}.]+$/u)?.[0] ?? "";
  if (SHORTENED.has(word.toLowerCase().replaceAll(".", "")) || /^\p{L}(\.\p{L})*$/u.test(word)) return false;
  if (/^\d{1,2}$/.test(word)) {
    const opens = before.trim() === word; // "1. A star": the number of a line
    return !opens && language !== "de"; // German writes "am 3. Mai"
  }
  return true;
}

/** A sentence in parts that are not too long, cut after a comma or a word; none where it has no word. */
function pieces(sentence) {
  const parts = [];
  let left = sentence.replace(/\s+/g, " ").trim();
  while (left.length > LONGEST) {
    const head = left.slice(0, LONGEST);
    const comma = Math.max(...[..."，、；,;:"].map((mark) => head.lastIndexOf(mark) + 1));
    const cut = comma > LONGEST / 3 ? comma : head.lastIndexOf(" ") + 1 || LONGEST;
    parts.push(left.slice(0, cut).trim());
    left = left.slice(cut).trim();
  }
  return [...parts, left].filter((part) => /[\p{L}\p{N}]/u.test(part));
}

const USUAL = {
  en: "the a an is are and of to in there it with on that this yes no not",
  es: "el la los las un una es son y de en hay con que sí no está del al",
  de: "der die das ein eine ist sind und von zu im in es mit auf dass ja nein nicht gibt",
};

/** The language of a text by its most usual words and its script; `otherwise` where they do not tell. */
export function languageOf(text, otherwise) {
  const letters = text.match(/\p{L}/gu)?.length ?? 0;
  if ((text.match(/\p{Script=Han}/gu)?.length ?? 0) > letters / 4) return "zh";
  const words = text.toLowerCase().match(/\p{L}+/gu) ?? [];
  let best = [0, otherwise];
  for (const [language, usual] of Object.entries(USUAL)) {
    const known = new Set(usual.split(" "));
    const score = words.filter((word) => known.has(word)).length + (language === otherwise ? 0.5 : 0);
    if (score > best[0]) best = [score, language];
  }
  return best[1];
}
