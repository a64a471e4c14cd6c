// The pictures and recordings of a question that is not asked yet: sent to the server as soon as they
// are chosen, shown with how much of them is sent.

import { ApiError, objectUrl, remove, upload } from "../core/api.js";
import { openLightbox } from "../core/dialog.js";
import { h, icon, iconButton } from "../core/dom.js";
import { site } from "../core/model.js";
import { t } from "../core/texts.js";
import { tell, toast } from "../core/toast.js";

const SHOWN = /^image\/(png|jpeg|gif|webp|bmp|avif)$/; // what browsers show; others come back as PNG
const MEGABYTE = 1024 * 1024;

export class Attachments {
  /** `onChange` is called when one comes, is sent, or goes. */
  constructor(onChange) {
    this.items = [];
    this.onChange = onChange;
    this.element = h("ul", { class: "attachments", label: "attached", hidden: true });
  }

  get count() {
    return this.items.length;
  }

  get isSending() {
    return this.items.some((item) => !item.id);
  }

  /** Take files; what cannot be used is told in a line each, and the others stay. */
  add(files) {
    for (const file of files) {
      const most = site().limits.upload;
      if (file.size > most) {
        const values = { name: file.name, megabytes: most / MEGABYTE };
        tell(new ApiError(413, { key: "upload_too_large", values }));
      } else this.#send(file);
    }
  }

  #send(file) {
    const kind = file.type.startsWith("audio/") ? "recording" : "picture";
    const item = { name: file.name, kind, controller: new AbortController() };
    if (SHOWN.test(file.type)) item.source = URL.createObjectURL(file);
    this.#show(item);
    const onProgress = (share) => item.bar.style.setProperty("--share", share);
    item.sent = upload(file, { onProgress, signal: item.controller.signal }).then(
      (told) => this.#arrived(item, told),
      (error) => {
        this.#leave(item);
        tell(error);
        return error.name === "AbortError"; // taken out by the reader: the others are asked about
      },
    );
  }

  #arrived(item, told) {
    if (told.kind === "recording" && !site().can.hear) {
      this.remove(Object.assign(item, told));
      tell(new ApiError(409, { key: "no_speech_model" }));
      return false;
    }
    Object.assign(item, { id: told.id, name: told.name, kind: told.kind });
    this.#draw(item);
    this.onChange();
    return true;
  }

  #show(item) {
    item.bar = h("span", { class: "sent", "aria-hidden": "true" });
    item.element = h("li", { class: "attachment" });
    this.items.push(item);
    this.#draw(item);
    this.element.append(item.element);
    this.element.hidden = false;
    this.onChange();
  }

  #draw(item) {
    const { name } = item;
    const isReady = Boolean(item.id);
    if (item.kind === "picture" && isReady) item.source ??= `uploads/${item.id}`;
    const drawing = item.kind === "recording" ? "voice" : "pictures";
    const isSeen = item.source && item.kind === "picture";
    const what = isSeen ? this.#picture(item) : h("span", { class: "file" }, icon(drawing), h("span", {}, name));
    item.element.dataset.state = isReady ? "ready" : "sending";
    item.element.title = name;
    const named = { label: ["remove_attachment_named", { name }], class: "attachment-remove" };
    const away = iconButton("close", "remove_attachment", () => this.remove(item), named);
    item.element.replaceChildren(what, isReady ? "" : item.bar, away);
  }

  #picture(item) {
    const image = h("img", { alt: "" });
    const { source } = item;
    if (source.startsWith("blob:")) image.src = source;
    else objectUrl(source).then((url) => (image.src = url), tell);
    const open = () => {
      const pictures = this.pictures;
      openLightbox(pictures, pictures.indexOf(source));
    };
    const label = ["picture_attached", { name: item.name }];
    return h("button", { type: "button", class: "thumbnail", label, onclick: open }, image);
  }

  /** What to show of the pictures: paths below /app/ or blob: URLs. */
  get pictures() {
    return this.items.map((item) => item.source).filter(Boolean);
  }

  /** Take one out; the server may forget it. */
  remove(item) {
    item.controller?.abort();
    if (item.id) remove(`uploads/${item.id}`).catch((error) => console.debug("not removed:", error.message)); // it is swept later
    this.#leave(item);
  }

  #leave(item) {
    this.items = this.items.filter((other) => other !== item);
    item.element.remove();
    this.element.hidden = this.items.length === 0;
    this.onChange();
  }

  /** Wait until all are sent. Whether none was refused. */
  async settled() {
    return (await Promise.all(this.items.map((item) => item.sent ?? true))).every(Boolean);
  }

  /** Take all out, for a question that is asked: its items. */
  takeOut() {
    const { items } = this;
    this.items = [];
    this.element.replaceChildren();
    this.element.hidden = true;
    return items;
  }

  /** Put items back that were taken out. */
  putBack(items) {
    this.items = [...items, ...this.items];
    this.element.prepend(...items.map((item) => item.element));
    this.element.hidden = this.items.length === 0;
    this.onChange();
  }

  /** What a draft keeps of those that are sent. */
  kept() {
    return this.items.filter((item) => item.id).map(asKept);
  }

  /** Show what a draft has kept, as far as the server still has it. */
  async restore(kept) {
    const there = await Promise.all(kept.map((item) => isThere(item)));
    kept.forEach((item, index) => there[index] && this.#show({ ...item }));
    if (there.includes(false)) toast(t("draft_lost_files"));
  }
}

/** What a draft keeps of one. */
export const asKept = ({ id, name, kind }) => ({ id, name, kind });

async function isThere({ id, kind }) {
  if (kind !== "picture") return true; // only pictures can be asked for; the question tells
  try {
    await objectUrl(`uploads/${id}`);
    return true;
  } catch (error) {
    if (error instanceof ApiError) return false;
    throw error;
  }
}
