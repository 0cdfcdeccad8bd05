// The loss chart. uPlot is loaded when first needed: its module throws at load for some locales,
// and then words must do.
import { make } from "./dom.js";
import { columns, lossText } from "./run_state.js";
import { say } from "./say.js";

let library;

function load() {
  library ??= import("./vendor/uplot/uPlot.esm.js").then((m) => m.default).catch(() => null);
  return library;
}

function colours(element) {
  const style = getComputedStyle(element);
  const read = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
  const [text, grid] = [read("--input-text", "#888"), read("--border-color", "#4444")];
  return { text, grid, validation: style.color }; // the one that the style sheet mixed
}

// Of a distance between ticks, as many for every tick: 0.05 and 0.10.
const decimals = (step) => String(Number(step.toPrecision(3))).split(".")[1]?.length ?? 0;

function options(size, theme) {
  const axis = {
    stroke: theme.text, grid: { stroke: theme.grid, width: 1 }, ticks: { stroke: theme.grid },
    font: "10px sans-serif", labelFont: "10px sans-serif", labelSize: 13, labelGap: 0, gap: 2,
  };
  const values = (u, ticks, axis, space, step) => ticks.map((v) => v.toFixed(decimals(step)));
  const line = (label, stroke, more = {}) => (
    { label, stroke, spanGaps: true, points: { show: false }, ...more });
  const point = { show: true, size: 9, fill: "#e69f00", stroke: theme.text };
  return {
    ...size,
    cursor: { y: false, points: { show: false } },
    legend: { show: false },
    scales: { x: { time: false } },
    axes: [
      { ...axis, label: say("step"), size: 26, values: (u, ticks) => ticks.map(String) },
      { ...axis, label: say("loss"), size: 40, values },
    ],
    series: [
      {},
      line("loss", theme.text, { width: 1, alpha: 0.3 }),
      line("smoothed", theme.text, { width: 1.5, alpha: 0.75 }),
      line("validation", theme.validation, { width: 2 }),
      line("best", "#e69f00", { width: 0, points: point }),
      line("base", theme.text, { width: 1, dash: [4, 4] }),
    ],
  };
}

export class Chart {
  constructor() {
    this.plot = null;
    this.root = make("div", "cntlora-chart", { role: "img", "aria-label": "" });
    this.resize = new ResizeObserver(() => this.#redraw());
    this.resize.observe(this.root);
    this.theme = null;
  }

  // Only of a chart in the page: a node that the host makes to copy it is never removed, and what
  // listens to the whole page would keep it.
  #followTheme() {
    this.theme ??= new MutationObserver(() => this.#redraw());
    for (const element of [document.documentElement, document.body]) {
      this.theme.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
  }

  show(state) {
    this.state = state;
    const text = lossText(state);
    this.root.setAttribute("aria-label", text);
    this.root.hidden = !text;
    if (text) this.#draw();
    else this.#clear();
  }

  #redraw() {
    if (this.state && !this.root.hidden) this.#draw();
  }

  async #draw() {
    const uPlot = await load();
    const size = { width: this.root.clientWidth, height: this.root.clientHeight };
    if (!uPlot || size.width < 40 || size.height < 40) return;
    const theme = colours(this.root);
    const key = JSON.stringify(theme);
    // A canvas cannot read CSS variables: colours are fixed when it is made.
    if (this.plot && key !== this.colours) this.#clear();
    if (!this.plot) {
      this.#followTheme();
      this.colours = key;
      this.plot = new uPlot(options(size, theme), columns(this.state), this.root);
      return;
    }
    if (this.plot.width !== size.width || this.plot.height !== size.height) this.plot.setSize(size);
    this.plot.setData(columns(this.state));
  }

  #clear() {
    this.plot?.destroy();
    this.plot = null;
  }

  destroy() {
    this.resize.disconnect();
    this.theme?.disconnect();
    this.#clear();
  }
}
