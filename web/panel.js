// One node's panel: words, numbers, the loss chart and the strip of samples.
import { Chart } from "./chart.js";
import { accept, emptyState, headline, numbers } from "./run_state.js";

function make(tag, className, attributes = {}) {
  const element = document.createElement(tag);
  element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

export class Panel {
  // `read`: () => promise of all events of the node's last run; `picture`: (folder, file) => address.
  constructor({ read, picture, chart = true }) {
    Object.assign(this, { read, picture, state: emptyState(), abort: new AbortController() });
    this.root = make("div", "cntlora-panel");
    this.headline = make("div", "cntlora-headline", { role: "status", "aria-live": "polite" });
    this.numbers = make("div", "cntlora-numbers");
    this.root.append(this.headline, this.numbers);
    if (chart) this.#withChart();
    this.what = (step) => (chart ? `Samples at step ${step}` : "Rank map of the UNet");
    this.strip = make("div", chart ? "cntlora-strip" : "cntlora-strip cntlora-map", { role: "group", "aria-label": chart ? "Samples while training" : "Rank map" });
    this.strip.addEventListener("wheel", (e) => e.stopPropagation(), { signal: this.abort.signal });
    this.root.append(this.strip);
    this.#show();
  }

  #withChart() {
    this.legend = make("div", "cntlora-legend", { "aria-hidden": "true" });
    for (const [kind, text] of [["raw", "loss"], ["smooth", "smoothed"], ["validation", "validation"], ["best", "best"], ["base", "base model"]]) {
      const item = make("span", `cntlora-key cntlora-key-${kind}`);
      item.textContent = text;
      this.legend.append(item);
    }
    this.plot = make("div", "cntlora-chart", { role: "img" });
    this.root.append(this.legend, this.plot);
    this.chart = new Chart(this.plot);
    this.resize = new ResizeObserver(() => this.chart.redraw());
    this.resize.observe(this.plot);
    this.theme = new MutationObserver(() => this.chart.redraw());
    for (const element of [document.documentElement, document.body]) {
      this.theme.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
  }

  // Live events. A page that came late, or missed some, reads the whole run again.
  take(events) {
    for (const event of events) {
      if (accept(this.state, event) === "gap") return this.replay();
    }
    this.#show();
  }

  async replay() {
    const events = await this.read();
    const state = emptyState();
    for (const event of events) accept(state, event);
    if (state.run !== this.state.run || state.seq > this.state.seq) this.state = state;
    this.#show();
  }

  #show() {
    const { state } = this;
    this.headline.textContent = headline(state);
    this.headline.classList.toggle("cntlora-failed", state.ended?.ok === false);
    const notes = state.notices.length ? ` · ${state.notices.at(-1)}` : "";
    this.numbers.textContent = numbers(state) + notes;
    this.#showSamples();
    if (!this.chart) return;
    const best = state.best ? `, best ${state.best[1].toFixed(4)} at step ${state.best[0]}` : "";
    this.plot.setAttribute("aria-label", `Loss over ${state.step} steps${best}`);
    this.chart.draw(state);
  }

  #showSamples() {
    const wanted = this.state.samples.map((s) => s.file);
    for (const child of [...this.strip.children]) if (!wanted.includes(child.dataset.file)) child.remove();
    const shown = new Set([...this.strip.children].map((c) => c.dataset.file));
    for (const { step, file } of this.state.samples) {
      if (shown.has(file)) continue;
      const button = make("button", "cntlora-sample", { type: "button", "aria-label": `${this.what(step)}, enlarge`, "data-file": file });
      const image = make("img", "", { src: this.picture(this.state.folder, file), alt: this.what(step) });
      const label = make("span", "cntlora-step");
      label.textContent = `step ${step}`;
      button.append(image, ...(this.chart ? [label] : []));
      button.addEventListener("click", () => this.#enlarge(step, file), { signal: this.abort.signal });
      this.strip.append(button);
      image.addEventListener("load", () => { this.strip.scrollLeft = this.strip.scrollWidth; }, { signal: this.abort.signal });
    }
  }

  #enlarge(step, file) {
    const dialog = make("dialog", "cntlora-dialog", { "aria-label": this.what(step) });
    const image = make("img", "", { src: this.picture(this.state.folder, file), alt: this.what(step) });
    const close = make("button", "cntlora-close", { type: "button" });
    close.textContent = "Close";
    dialog.append(image, close);
    close.addEventListener("click", () => dialog.close());
    image.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    dialog.addEventListener("keydown", (e) => { // ComfyUI's shortcuts are for the graph behind
      e.stopPropagation();
      if (e.key === "Escape") dialog.close();
    });
    document.body.append(dialog);
    dialog.showModal();
    close.focus();
  }

  destroy() {
    this.abort.abort();
    this.resize?.disconnect();
    this.theme?.disconnect();
    this.chart?.destroy();
  }
}
