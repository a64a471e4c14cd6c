// Which room is open, by the address: #/chat/ID, #/voice/ID, #/batch, #/training/RUN. Every one is a
// link, and the browser's back button goes back.

const listeners = new Set();

/** {room, argument} of the address. */
export function route() {
  const [room = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  return { room: room || "chat", argument: decode(rest.join("/")) };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return ""; // a link that was cut in the middle of a character
  }
}

export const link = (room, argument = "") => `#/${room}${argument ? `/${encodeURIComponent(argument)}` : ""}`;

/** Open a room; `replace` leaves no step to go back to. */
export function go(room, argument = "", { replace = false } = {}) {
  const target = link(room, argument);
  if (location.hash === target) return;
  if (replace) {
    history.replaceState(null, "", target);
    tell();
  } else location.hash = target;
}

/** Call `listener` with {room, argument} whenever the address changes. */
export const onRoute = (listener) => listeners.add(listener);

function tell() {
  for (const listener of listeners) listener(route());
}
addEventListener("hashchange", tell);
