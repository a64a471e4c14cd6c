// When a conversation was last changed, as people say it.

import { language, t } from "../core/texts.js";

const day = (date) => Date.UTC(date.getFullYear(), date.getMonth(), date.getDate()) / 86_400_000;
const written = (date, format) => new Intl.DateTimeFormat(variety(), format).format(date);

/** The chosen language as the browser's user has it, such as en-GB: its clock and its order of day and month. */
const variety = () => navigator.languages.find((one) => one.split("-")[0] === language()) ?? language();

/** The heading that a conversation of the list stands under. */
export function groupOf({ pinned, updated }, now = new Date()) {
  if (pinned) return t("history_pinned");
  const date = new Date(updated * 1000);
  const days = day(now) - day(date);
  if (days <= 0) return t("history_today");
  if (days === 1) return t("history_yesterday");
  if (days < 7) return t("history_week");
  if (days < 30) return t("history_month");
  const name = written(date, { month: "long", year: "numeric" });
  return name[0].toLocaleUpperCase(language()) + name.slice(1);
}

/** The time of today, the day of another time. */
export function shortly(updated, now = new Date()) {
  const date = new Date(updated * 1000);
  const days = day(now) - day(date);
  if (days <= 0) return written(date, { timeStyle: "short" });
  if (days < 7) return written(date, { weekday: "short", hour: "numeric", minute: "2-digit" });
  const year = date.getFullYear() === now.getFullYear() ? {} : { year: "numeric" };
  return written(date, { day: "numeric", month: "short", ...year });
}
