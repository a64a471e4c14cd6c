// The conversation that is open, and the answers that are being written: what the parts of the chat
// room share. An answer goes on while the reader looks at another conversation.

import { ApiError, events, get, patch, post } from "../core/api.js";
import { randomId } from "../core/remembered.js";
import { go } from "../core/router.js";
import { settings } from "../core/settings.js";

const WATCHED = 1500; // milliseconds between two looks at what another window has asked

/**
 * `on(listener)`: it is called as listener(kind, detail) with
 *   "opened"   another conversation (or a new, empty one) is open;
 *   "changed"  what is open has other turns, or another title, than before;
 *   "text"     the answer that is being written has grown: {text, html};
 *   "heard"    a recording among the uploads is being understood: {text};
 *   "busy"     `busy` has changed;
 *   "listed"   the list of conversations may have changed.
 */
export class Chat {
  id = ""; // of the open conversation; "" while nothing was asked in it
  conversation = null; // as the server told it last
  mode = "chat"; // or "voice"
  system = ""; // the system prompt that a new conversation begins with
  #fresh = randomId(8); // what a new conversation will be called
  #wanted = ""; // what is being opened
  #answers = new Map(); // by the id of their conversation
  #listeners = new Set();
  #changed = Promise.resolve(); // when the last change has been answered

  on(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #tell(kind, detail) {
    for (const listener of this.#listeners) listener(kind, detail);
  }

  /** The answer that is being written here: {asked, text, html, question, before}, or null. */
  get answer() {
    return this.#answers.get(this.#key) ?? null;
  }

  get busy() {
    return this.#answers.has(this.#key);
  }

  get #key() {
    return this.id || this.#fresh;
  }

  /** The turns to show, those included that the server has not confirmed yet. */
  get turns() {
    const { answer, conversation } = this;
    if (!answer) return conversation?.turns ?? [];
    const before = answer.asked ? conversation.turns : answer.before;
    const question = answer.asked ? null : answer.question;
    const written = { node: "answer", role: "assistant", text: answer.text, html: answer.html, isWritten: true };
    return [...before, ...(question ? [question] : []), { versions: [], pictures: [], note: null, ...written }];
  }

  /** Open a conversation, or with "" a new one. Throws `ApiError` where it is not there. */
  async open(id) {
    if (id === this.#wanted && (id || !this.busy)) return;
    this.#wanted = id;
    const running = this.#answers.get(id);
    const conversation = id ? running?.conversation ?? (await this.#read(id)) : null;
    if (this.#wanted !== id) return; // another one was opened meanwhile
    Object.assign(this, { id, conversation });
    if (!id) this.#fresh = randomId(8);
    this.#watch();
    go(this.mode, id);
    this.#tell("opened");
    this.#tell("busy");
  }

  async #read(id) {
    try {
      return await get(`conversations/${id}`);
    } catch (error) {
      if (this.#wanted === id) this.#wanted = this.id;
      throw error;
    }
  }

  /** Adopt a conversation that a route has answered with. */
  take(conversation) {
    if (conversation.id === this.#key) {
      this.conversation = conversation;
      if (!this.id) {
        this.id = conversation.id;
        if (this.#wanted === "") {
          this.#wanted = this.id;
          go(this.mode, this.id, { replace: true });
        }
      }
      this.#watch();
      this.#tell("changed");
    }
    this.#tell("listed");
  }

  /** While an answer is being written in another window, look how far it is. */
  #watch() {
    clearTimeout(this.watch);
    if (!this.conversation?.answering || this.busy) return;
    this.watch = setTimeout(() => this.refresh().catch((error) => console.debug("not read:", error.message)), WATCHED);
  }

  /** Read the open conversation again: it may have been changed in another window. */
  async refresh() {
    const { id } = this;
    if (!id) return;
    const conversation = await get(`conversations/${id}`);
    if (this.id === id) this.take(conversation);
  }

  // -- answers -----------------------------------------------------------------------------------

  /**
   * Ask: `uploads` are ids, `example` the key of one or null, `pictures` what to show of them
   * until the server has them (paths below /app/ or blob: URLs). Returns the conversation with its
   * answer. Throws what it was refused with; its `asked` says whether the question stands in the
   * conversation nevertheless.
   */
  ask({ text = "", uploads = [], example = null, pictures = [] }) {
    const body = { text, uploads, example };
    if (!this.id && this.system) body.system = this.system;
    const question = { node: "question", role: "user", text, pictures, versions: [], isSent: true };
    return this.#answer("ask", body, this.conversation?.turns ?? [], question);
  }

  /** Another answer beside the one of a node, which is kept; `node` may be its question's. */
  regenerate(node) {
    const { turns } = this.conversation;
    const at = turns.findIndex((turn) => turn.node === node);
    return this.#answer("regenerate", { node }, turns.slice(0, turns[at].role === "user" ? at + 1 : at));
  }

  /** Ask a question in other words, with its pictures; the former one is kept. */
  edit(node, text) {
    const { turns } = this.conversation;
    const at = turns.findIndex((turn) => turn.node === node);
    const question = { ...turns[at], node: "question", text, versions: [], isSent: true };
    return this.#answer("edit", { node, text }, turns.slice(0, at), question);
  }

  async #answer(action, body, before, question = null) {
    const id = this.#key;
    if (this.busy) throw new ApiError(409, { key: "still_answering" });
    const answer = { asked: false, before, question, text: "", html: "", controller: new AbortController() };
    const version = this.conversation?.version ?? 0;
    this.#answers.set(id, answer);
    this.#tell("changed");
    this.#tell("busy");
    let done = null;
    const hear = (name, data) => {
      if (name === "done") done = data.conversation;
      else this.#hear(id, answer, name, data, body.text);
    };
    try {
      const whole = { version, settings: settings(), ...body };
      await events(`conversations/${id}/${action}`, whole, hear, answer.controller);
      if (!done) throw new ApiError(0, { key: "no_connection" });
    } catch (error) {
      this.#answers.delete(id);
      error.asked = answer.asked;
      await this.#recover(id, answer, error);
      throw error;
    }
    this.#answers.delete(id);
    this.take(done);
    if (id === this.#key) this.#tell("busy");
    return done;
  }

  #hear(id, answer, name, data, typed) {
    const isShown = id === this.#key;
    if (name === "asked") {
      Object.assign(answer, { asked: true, conversation: data.conversation });
      this.take(data.conversation);
    } else if (name === "text") {
      Object.assign(answer, data);
      if (isShown) this.#tell("text", data);
    } else if (name === "heard") {
      answer.question = { ...answer.question, text: `${typed} ${data.text}`.trim() };
      if (isShown) this.#tell("heard", data);
    }
  }

  /** Show what the server has, after an answer that failed. */
  async #recover(id, answer, error) {
    try {
      const isLeft = error.name === "AbortError"; // the server may have it all the same
      const turns = this.conversation?.turns.length;
      if (id === this.id && (answer.asked || isLeft || error.key === "changed_elsewhere")) await this.refresh();
      if (id === this.id && isLeft) error.asked ||= this.conversation.turns.length > turns;
    } catch (fault) {
      if (!(fault instanceof ApiError)) throw fault; // the first error is the one to tell
    }
    if (id === this.#key) {
      this.#tell("changed");
      this.#tell("busy");
    }
  }

  /** End the answer that is being written; what it said so far stays. */
  async stop() {
    const { answer } = this;
    if (!answer) return;
    if (answer.asked) await post(`conversations/${this.#key}/stop`);
    else answer.controller.abort(); // it waits, or a recording is being understood
  }

  // -- other changes ------------------------------------------------------------------------------

  /** Show another version of a turn, with what followed it. */
  show(node) {
    return this.#change("show", { node });
  }

  /** Delete from a turn on; `undo` with what this gives takes it back. */
  cut(node) {
    return this.#change("cut", { node });
  }

  /** Have the model no longer read the oldest turns. */
  drop(turns) {
    return this.#change("drop", { turns });
  }

  /** Take back the last cut of a conversation. */
  async undo({ id, version }) {
    const conversation = await post(`conversations/${id}/undo`, { version });
    this.take(conversation);
    return conversation;
  }

  /** Change `title`, `pinned` or `system` of the open conversation. */
  change(fields) {
    return this.#asIs((id, version) => patch(`conversations/${id}`, { version, ...fields }));
  }

  #change(action, body) {
    return this.#asIs((id, version) => post(`conversations/${id}/${action}`, { version, ...body }));
  }

  /** Changes are sent one after the other, each with the version that the one before has made. */
  #asIs(request) {
    const answered = this.#changed.then(() => this.#send(request));
    this.#changed = answered.catch(() => {}); // told to who has asked for it
    return answered;
  }

  async #send(request) {
    try {
      const conversation = await request(this.id, this.conversation.version);
      this.take(conversation);
      return conversation;
    } catch (error) {
      if (error.key === "changed_elsewhere") await this.refresh();
      throw error;
    }
  }
}
