// One node's panel: words, numbers, and the loss chart with samples or the map of the ranks.
import { pictureAddress, readRun } from "./api_client.js";
import { Chart } from "./chart.js";
import { make, scrolls } from "./dom.js";
import { RankMap } from "./rank_map.js";
import {
  accept, acceptAnyway, emptyState, headline, isLater, isNewer, lossText, numbers, spoken,
} from "./run_state.js";
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
    this.headline = make("div", "cntlora-headline");
    this.spoken = make("div", "cntlora-spoken", { role: "status", "aria-live": "polite" });
    this.numbers = make("div", "cntlora-numbers");
    const warnings = { role: "log", "aria-label": say("Warnings"), tabindex: 0 };
    this.notices = make("div", "cntlora-notices", warnings);
    scrolls(this.notices);
    const told = [this.headline, this.spoken, this.numbers, this.notices];
    this.root = make("div", "cntlora-panel", {}, ...told);
    if (kind === "train") this.#withChart();
    else this.#add(new RankMap());
    this.#show();
  }

  // The page that began the run which is shown.
  get client() {
    return this.state.client;
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

  // Live events. A page that came late, or missed some, reads the whole run again, once for all
  // that come meanwhile; what even then lacks those before it (the server could not keep them)
  // is taken as it is.
  async take(events) {
    this.failure = null;
    if (events.some((event) => accept(this.state, event) === "gap")) {
      this.reading ??= this.replay().catch(() => {}).finally(() => { this.reading = null; });
      await this.reading;
      for (const event of events) acceptAnyway(this.state, event);
    }
    this.#show();
  }

  // What the server keeps of the last run. `anew`: after it was away, when it may have lost it.
  async replay({ anew = false } = {}) {
    const state = stateOf(await this.read());
    if (isNewer(state, this.state)) Object.assign(this, { state, failure: null });
    else if (anew && !state.run && this.state.run && !this.state.ended) {
      this.failure = say("ComfyUI was restarted: this run has ended");
    }
    this.#show();
  }

  // The run that made what an output gave, which may be one of another tab's workflow. `older`:
  // also in place of a later one.
  async retrace(trace, { older = true } = {}) {
    if (older) this.failure = null;
    const wanted = () => trace.run !== this.state.run && (older || isLater(trace, this.state));
    if (wanted()) {
      const state = stateOf(await readRun(trace).catch(() => []));
      if (state.run && wanted()) this.state = state;
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
    this.#speak(this.failure ?? spoken(state));
    this.headline.classList.toggle("cntlora-failed", failed);
    this.headline.classList.toggle("cntlora-hint", !failed && !state.run);
    this.numbers.textContent = this.numbers.title = numbers(state);
    this.#showNotices(state.notices);
    if (this.legend) this.legend.hidden = !lossText(state);
    for (const part of this.parts) part.show(state);
  }

  // For those who do not see it: a sentence when something begins or ends, not every number.
  #speak(sentence) {
    if (sentence !== this.spoken.textContent) this.spoken.textContent = sentence;
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
