// The ranks that calibration chose: a row per transformer block, a cell per projection. The shade
// is the energy its components hold, in decades.
import { make, scrolls } from "./dom.js";
import { rankRows } from "./run_state.js";
import { say } from "./say.js";

const DECADES = 4; // what is further below the largest energy shares the faintest shade

function shade(energy, largest) {
  if (!(energy > 0) || !(largest > 0)) return 0;
  return Math.max(0, 1 + Math.log10(energy / largest) / DECADES);
}

export class RankMap {
  constructor() {
    this.drawn = null;
    const said = { role: "region", "aria-label": say("Rank of every layer"), tabindex: 0 };
    this.root = make("div", "cntlora-map", said);
    scrolls(this.root);
  }

  show({ calibrated }) {
    if (calibrated === this.drawn) return;
    this.drawn = calibrated;
    this.root.replaceChildren(...(calibrated ? [table(calibrated)] : []));
  }

  destroy() {}
}

function table({ ranks, energy }) {
  const { groups, columns, rows } = rankRows(ranks);
  const largest = Math.max(...Object.values(energy), 0);
  const head = make("tr", "", {}, make("th", ""), ...groups.map(([name, span]) =>
    make("th", "cntlora-group", { colspan: span, scope: "colgroup" }, name)));
  const names = make("tr", "", {}, make("th", ""), ...columns.map(({ name, first }) =>
    make("th", first ? "cntlora-first" : "", { scope: "col" }, name)));
  const body = rows.map(({ name, cells }) => make("tr", "", {},
    make("th", "", { scope: "row" }, name),
    ...cells.map((layer, i) => cell(layer, columns[i].first, ranks, energy, largest))));
  return make("table", "", {}, make("thead", "", {}, head, names), make("tbody", "", {}, ...body));
}

function cell(layer, first, ranks, energy, largest) {
  const element = make("td", first ? "cntlora-first" : "", {}, String(ranks[layer] ?? ""));
  if (layer === undefined) return element;
  const share = shade(energy[layer], largest);
  element.style.setProperty("--share", `${Math.round(share * 100)}%`);
  element.title = say("{layer}: rank {rank}", { layer, rank: ranks[layer] });
  return element;
}
