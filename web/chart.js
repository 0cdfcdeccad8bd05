// The loss chart. uPlot is loaded when first needed: its module throws at load for some locales, and then words must do.
import { columns } from "./run_state.js";

let library;

function load() {
  library ??= import("./vendor/uplot/uPlot.esm.js").then((m) => m.default).catch(() => null);
  return library;
}

function colours(element) {
  const style = getComputedStyle(element);
  const read = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
  return { text: read("--input-text", "#888"), grid: read("--border-color", "#4444") };
}

function options(size, theme) {
  const axis = { stroke: theme.text, grid: { stroke: theme.grid, width: 1 }, ticks: { stroke: theme.grid }, font: "10px sans-serif" };
  const line = (label, stroke, more = {}) => ({ label, stroke, spanGaps: true, points: { show: false }, ...more });
  return {
    ...size,
    cursor: { y: false, points: { show: false } },
    legend: { show: false },
    scales: { x: { time: false } },
    axes: [{ ...axis, size: 24, gap: 2 }, { ...axis, size: 44, gap: 2, values: (u, ticks) => ticks.map((v) => v.toPrecision(2)) }],
    series: [
      {},
      line("loss", "#8a8f9855", { width: 1 }),
      line("smoothed", "#8a8f98", { width: 1.5 }),
      line("validation", "#3b9ddd", { width: 2 }),
      line("best", "#e69f00", { width: 0, points: { show: true, size: 9, fill: "#e69f00", stroke: "#e69f00" } }),
      line("base", theme.text, { width: 1, dash: [4, 4] }),
    ],
  };
}

export class Chart {
  constructor(mount) {
    this.mount = mount;
    this.plot = null;
  }

  async draw(state) {
    this.state = state;
    const uPlot = await load();
    const size = { width: this.mount.clientWidth, height: this.mount.clientHeight };
    if (!uPlot || size.width < 40 || size.height < 40) return;
    const theme = colours(this.mount);
    const key = JSON.stringify(theme);
    if (this.plot && key !== this.theme) this.destroy(); // canvas cannot read CSS variables: colours are fixed when it is made
    if (!this.plot) {
      this.theme = key;
      this.plot = new uPlot(options(size, theme), columns(state), this.mount);
      return;
    }
    if (this.plot.width !== size.width || this.plot.height !== size.height) this.plot.setSize(size);
    this.plot.setData(columns(state));
  }

  redraw() {
    if (this.state) this.draw(this.state);
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
  }
}
