// What this browser keeps between visits. A browser may refuse to keep anything: then a visit's
// choices last as long as its page.

const PREFIX = "phisight.";
const visit = new Map();

/** What was kept under a name, or `otherwise`. */
export function remembered(name, otherwise) {
  if (visit.has(name)) return visit.get(name);
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(PREFIX + name));
  } catch (error) {
    console.debug("not kept:", name, error.message); // another program's value, or storage is off
  }
  return kept ?? otherwise;
}

export function remember(name, value) {
  visit.set(name, value);
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch (error) {
    console.debug("not kept:", name, error.message);
  }
}

export function forget(name) {
  visit.delete(name);
  try {
    localStorage.removeItem(PREFIX + name);
  } catch (error) {
    console.debug("not kept:", name, error.message);
  }
}

/** This browser's key: whoever has it sees its conversations, so it is sent to the server alone. */
export function browserKey() {
  let key = remembered("key", "");
  if (!/^[0-9a-f]{32}$/.test(key)) {
    key = randomId(16);
    remember("key", key);
  }
  return key;
}

/** So many random bytes in hexadecimal. */
export const randomId = (bytes) =>
  [...crypto.getRandomValues(new Uint8Array(bytes))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
