// What the page asks its server. Paths are relative to the server's /app/.

import { browserKey } from "./remembered.js";
import { t } from "./texts.js";

const HERE = new URL("../../../", import.meta.url); // …/app/static/VERSION/core/api.js -> …/app/

/** A request that was refused or failed: `key` and `values` of a text, or a `text`. */
export class ApiError extends Error {
  constructor(status, { key = null, values = {}, text = null, message = null } = {}) {
    super(text ?? message ?? key ?? `status ${status}`);
    Object.assign(this, { status, key, values, text: text ?? message }); // `message`: of the server's own guards
  }

  /** One line for the reader. */
  told() {
    return this.key ? t(this.key, this.values) : this.text ?? t("server_failed");
  }
}

export const url = (path) => new URL(path, HERE).href;

async function send(method, path, body, { signal, headers = {} } = {}) {
  const json = body !== undefined;
  let response;
  try {
    response = await fetch(url(path), {
      method,
      signal,
      headers: { "X-Browser-Key": browserKey(), ...(json ? { "Content-Type": "application/json" } : {}), ...headers },
      body: json ? JSON.stringify(body) : undefined,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { key: "no_connection" });
  }
  if (!response.ok) throw await refusal(response.status, () => response.json());
  return response;
}

async function refusal(status, read) {
  try {
    return new ApiError(status, (await read()).error);
  } catch {
    return new ApiError(status, { key: "server_failed" });
  }
}

/** What a GET answers, as JSON. */
export const get = async (path, options) => (await send("GET", path, undefined, options)).json();
export const post = async (path, body = {}, options) => (await send("POST", path, body, options)).json();
export const patch = async (path, body) => (await send("PATCH", path, body)).json();
export const remove = async (path, body) => (await send("DELETE", path, body)).json();

/** What a request answers, as a Blob: a picture, a sound, a file. */
export const blob = async (method, path, body, options) => (await send(method, path, body, options)).blob();

const objects = new Map();

/** A URL of a file that only this browser may see, for the src of an element. */
export function objectUrl(path) {
  if (!objects.has(path)) {
    const made = blob("GET", path).then((file) => URL.createObjectURL(file));
    made.catch(() => objects.delete(path));
    objects.set(path, made);
  }
  return objects.get(path);
}

/** Have the browser save a Blob under a name. */
export function save(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/**
 * POST, and hear the events of the answer as they come: `on(name, data)`. Returns when the stream
 * has ended; throws `ApiError` for a refusal, also for one that is told on the way.
 */
export async function events(path, body, on, { signal } = {}) {
  const response = await send("POST", path, body, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError" || signal?.aborted) throw new DOMException("left", "AbortError");
      throw new ApiError(0, { key: "no_connection" });
    }
    if (part.done) return;
    unread += part.value;
    const blocks = unread.split("\n\n");
    unread = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (!name || data === undefined) continue; // a comment that keeps the connection alive
      const value = JSON.parse(data);
      if (name === "error") throw new ApiError(500, value.error);
      on(name, value);
    }
  }
}

/** Send a file. `onProgress` hears the share that is sent, 0 to 1. Returns {id, name, kind}. */
export function upload(file, { onProgress = () => {}, signal } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", url(`uploads?name=${encodeURIComponent(file.name || "picture.png")}`));
    request.setRequestHeader("X-Browser-Key", browserKey());
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () => {
      if (request.status === 200) resolve(request.response);
      else reject(new ApiError(request.status, request.response?.error ?? { key: "server_failed" }));
    };
    request.onerror = () => reject(new ApiError(0, { key: "no_connection" }));
    request.onabort = () => reject(new DOMException("left", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}
