// One node's panel: words, numbers, and the loss chart with samples or the map of the ranks.
import { pictureAddress, readRun } from "./api_client.js";
import { Chart } from "./chart.js";
import { make, scrolls } from "./dom.js";
import { RankMap } from "./rank_map.js";
import { accept, emptyState, headline, lossText, numbers } from "./run_state.js";
import { say } from "./say.js";
import { Strip } from "./strip.js";

const legend = () => ({
  raw: say("loss"),
  smooth: say("smoothed"),
  validation: say("validation loss"),
  best: say("best"),
  base: say("base model"),
});
const HINTS = {
  train: () => say("Press Run: the loss, samples and the time left appear here"),
  calibrate: () => (
    say("Press Run: the rank of every layer and the loss before and after appear here")),
};

export class Panel {
  // `kind`: "train" or "calibrate"; `read`: () => promise of all events of the node's last run.
  constructor({ kind, read }) {
    Object.assign(this, { kind, read, state: emptyState(), failure: null, parts: [] });
    this.headline = make("div", "cntlora-headline", { role: "status", "aria-live": "polite" });
    this.numbers = make("div", "cntlora-numbers");
    const warnings = { role: "log", "aria-label": say("Warnings"), tabindex: 0 };
    this.notices = make("div", "cntlora-notices", warnings);
    scrolls(this.notices);
    this.root = make("div", "cntlora-panel", {}, this.headline, this.numbers, this.notices);
    if (kind === "train") this.#withChart();
    else this.#add(new RankMap());
    this.#show();
  }

  #add(part) {
    this.parts.push(part);
    this.root.append(part.root);
  }

  #withChart() {
    this.legend = make("div", "cntlora-legend", { "aria-hidden": "true" });
    for (const [kind, text] of Object.entries(legend())) {
      this.legend.append(make("span", `cntlora-key cntlora-key-${kind}`, {}, text));
    }
    this.root.append(this.legend);
    this.#add(new Chart());
    this.#add(new Strip(pictureAddress));
  }

  // Live events. A page that came late, or missed some, reads the whole run again.
  take(events) {
    this.failure = null;
    for (const event of events) {
      if (accept(this.state, event) === "gap") return this.replay();
    }
    this.#show();
  }

  async replay() {
    const state = stateOf(await this.read());
    if (state.run !== this.state.run || state.seq > this.state.seq) this.state = state;
    this.#show();
  }

  // The run that made what an output gave, which may be one of another tab's workflow.
  async retrace(trace) {
    this.failure = null;
    if (trace.run !== this.state.run) {
      const state = stateOf(await readRun(trace).catch(() => []));
      if (state.run) this.state = state;
    }
    this.#show();
  }

  fail(sentence) {
    this.failure = sentence;
    this.#show();
  }

  #show() {
    const { state } = this;
    const failed = this.failure !== null || state.ended?.ok === false;
    this.headline.textContent = this.failure ?? (state.run ? headline(state) : HINTS[this.kind]());
    this.headline.title = this.headline.textContent;
    this.headline.classList.toggle("cntlora-failed", failed);
    this.headline.classList.toggle("cntlora-hint", !failed && !state.run);
    this.numbers.textContent = this.numbers.title = numbers(state);
    this.#showNotices(state.notices);
    if (this.legend) this.legend.hidden = !lossText(state);
    for (const part of this.parts) part.show(state);
  }

  #showNotices(said) {
    const key = said.join("\n");
    if (key === this.said) return; // one who reads there has scrolled
    this.said = key;
    this.notices.hidden = !key;
    this.notices.replaceChildren(...said.map((text) => make("div", "cntlora-notice", {}, text)));
  }

  destroy() {
    for (const part of this.parts) part.destroy();
  }
}

function stateOf(events) {
  const state = emptyState();
  for (const event of events) accept(state, event);
  return state;
}
