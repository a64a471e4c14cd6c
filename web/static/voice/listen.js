// A recording sent to the server, and what was understood of it.

import { events, remove, upload } from "../core/api.js";
import { settings } from "../core/settings.js";

/**
 * What is said in a recording. `onHeard` gets the text so far. Leaving by `signal` ends the listening,
 * and nothing of the recording stays on the server.
 */
export async function heardIn(recording, name, { onHeard = () => {}, signal } = {}) {
  const file = recording instanceof File ? recording : new File([recording], name, { type: recording.type });
  const sent = await upload(file, { signal });
  let text = "";
  try {
    await events(
      "listen",
      { upload: sent.id, settings: settings() },
      (event, told) => {
        text = told.text;
        if (event === "heard") onHeard(text);
      },
      { signal },
    );
  } finally {
    remove(`uploads/${sent.id}`).catch((error) => console.debug("recording stays:", error.message));
  }
  return text;
}
