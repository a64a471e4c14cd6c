// What is sent to the server: few pictures ahead of what is asked, and not for longer than needed, so
// that any number of them passes through a server that keeps little.

import { ApiError, remove, upload } from "../core/api.js";

const KEPT_BYTES = 96 * 2 ** 20; // that stay on the server, so that the next question finds them there
const KEPT_FILES = 400;

export class Sender {
  #kept = new Map(); // row -> bytes, the oldest first
  #bytes = 0;

  /** `limit`: bytes of one file. */
  constructor(limit) {
    this.limit = limit;
  }

  /** Have a row's picture on the server. Throws `ApiError` where it is refused. */
  async send(row, { signal, onProgress }) {
    if (row.upload) return;
    if (row.file.size > this.limit) {
      throw new ApiError(413, { key: "upload_too_large", values: { name: row.file.name, megabytes: this.limit >> 20 } });
    }
    try {
      row.upload = (await upload(row.file, { signal, onProgress })).id;
    } catch (error) {
      if (error.status === 0 && !(await isReadable(row.file))) {
        throw new ApiError(400, { key: "batch_unreadable", values: { name: row.file.name } });
      }
      throw error;
    }
    this.#kept.set(row, row.file.size);
    this.#bytes += row.file.size;
    this.#trim();
  }

  /** Remove a row's picture from the server. */
  forget(row) {
    const id = row.upload;
    row.upload = null;
    this.#bytes -= this.#kept.get(row) ?? 0;
    this.#kept.delete(row);
    if (id) remove(`uploads/${id}`).catch((error) => console.debug("not removed:", error.message)); // swept after a day
  }

  #trim() {
    for (const row of this.#kept.keys()) {
      if (this.#bytes <= KEPT_BYTES && this.#kept.size <= KEPT_FILES) return;
      if (row.state.kind === "waiting") this.forget(row);
    }
  }
}

/** Whether a file is still there: a request with one that is not fails as a lost connection does. */
async function isReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}
