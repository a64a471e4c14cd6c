// Pictures that a person chooses, drops or pastes, also whole folders of them.

const ENDINGS = /\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|hei[cf])$/i;
const KINDS = /^image\//;

const isPicture = (file) => ENDINGS.test(file.name) || KINDS.test(file.type);
const isHidden = (name) => name.startsWith(".") || name === "Thumbs.db" || name === "desktop.ini";

/**
 * {found: [{file, folder}], passedOver: count} of a list of files. What was chosen one by one is taken
 * as it is, and judged by the server; of a folder, only what looks like a picture.
 */
export function sorted(files, { ofFolder = false } = {}) {
  const found = [];
  let passedOver = 0;
  for (const file of files) {
    const folder = (file.webkitRelativePath || "").split("/").slice(0, -1).join("/");
    if (!ofFolder || isPicture(file)) found.push({ file, folder });
    else if (!isHidden(file.name)) passedOver += 1;
  }
  return { found: ofFolder ? inOrder(found) : found, passedOver };
}

/** The same of what is dropped or pasted; folders are read through. */
export async function dropped(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  // Asked for at once: the items are empty when the event is over.
  const given = items.map((item) => ({ entry: item.webkitGetAsEntry?.(), file: item.getAsFile() }));
  const found = [];
  let passedOver = 0;
  for (const { entry, file } of given) {
    if (!entry?.isDirectory) {
      if (file) found.push({ file, folder: "" });
      continue;
    }
    const inside = [];
    for await (const one of filesIn(entry, entry.name)) {
      if (isPicture(one.file)) inside.push(one);
      else if (!isHidden(one.file.name)) passedOver += 1;
    }
    found.push(...inOrder(inside));
  }
  return { found, passedOver };
}

async function* filesIn(directory, folder) {
  const reader = directory.createReader();
  for (;;) {
    const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // some at a time
    if (!entries.length) return;
    for (const entry of entries) {
      if (entry.isDirectory) yield* filesIn(entry, `${folder}/${entry.name}`);
      else yield { file: await new Promise((resolve, reject) => entry.file(resolve, reject)), folder };
    }
  }
}

const collator = new Intl.Collator(undefined, { numeric: true });

const inOrder = (found) =>
  found.sort((one, other) => collator.compare(`${one.folder}/${one.file.name}`, `${other.folder}/${other.file.name}`));

/** What tells two files apart, as far as a page can know it. */
export const identity = ({ file, folder }) => [folder, file.name, file.size, file.lastModified].join("|");
