// The training room: all runs, or the dashboard of one. Read again every few seconds while somebody
// looks.

import { get } from "../core/api.js";
import { fill, h } from "../core/dom.js";
import { tell } from "../core/toast.js";
import { Comparison, MOST_COMPARED } from "./compare.js";
import { Dashboard } from "./dashboard.js";
import { RunLinks, RunList } from "./runs.js";
import { mountStart } from "./start.js";

const SECONDS = 2.5;
const LONGEST = 30; // seconds between two tries while the server does not answer

export function mount(element, { side }) {
  let told = { runs: [], left_out: 0 };
  let [shown, name, timer, asked, wait] = [null, "", 0, 0, SECONDS];
  const ticked = new Set();
  const links = new RunLinks();
  const comparison = new Comparison({ onEnd: endComparison });
  let list = makeList();
  const start = h("div", { class: "start" });
  const overview = h(
    "div",
    { class: "overview" },
    h(
      "header",
      { class: "training-head" },
      h("div", {}, h("h1", { say: "training" }), h("p", { class: "hint", say: "training_intro" })),
      start,
    ),
    list.element,
    comparison.element,
    comparison.bar,
  );
  const place = h("div", { class: "training-page" });
  element.append(place);
  side.append(links.element);
  mountStart(start, { runs: () => told.runs, refresh });

  function makeList() {
    return new RunList({ ticked, most: MOST_COMPARED, onTick: () => comparison.show([...ticked]).catch(tell) });
  }

  function endComparison() {
    ticked.clear();
    const former = list;
    list = makeList();
    former.element.replaceWith(list.element);
    list.update(told);
    comparison.show([]).catch(tell);
  }

  /** Read what is shown again, and once more in a while. */
  async function refresh() {
    clearTimeout(timer);
    const mine = ++asked;
    try {
      told = await get("runs");
      if (mine !== asked) return;
      links.update(told);
      list.update(told);
      const names = new Set(told.runs.map((run) => run.name));
      await (shown ? shown.refresh(names.has(name) || told.left_out > 0) : comparison.refresh(names));
      element.classList.remove("offline");
      wait = SECONDS;
    } catch (error) {
      wait = Math.min(wait * 1.6, LONGEST);
      if (!element.classList.contains("offline")) tell(error); // told once, not every few seconds
      element.classList.add("offline");
    } finally {
      if (mine === asked && isSeen()) timer = setTimeout(refresh, wait * 1000);
    }
  }

  const isSeen = () => !element.hidden && document.visibilityState === "visible";
  document.addEventListener("visibilitychange", () => isSeen() && refresh());
  addEventListener("online", () => isSeen() && refresh());

  return {
    show(argument) {
      if (!shown || argument !== name || shown.language !== document.documentElement.lang) {
        [name, shown] = [argument, argument ? new Dashboard(argument) : null];
        if (shown) shown.language = document.documentElement.lang;
      }
      links.chosen = name;
      fill(place, shown ? shown.element : overview);
      element.hidden = false;
      return refresh();
    },
    hide() {
      clearTimeout(timer);
      asked += 1;
    },
  };
}
