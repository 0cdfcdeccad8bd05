// What a run has reported so far, as plain data. No DOM here.
import { say } from "./say.js";

export function emptyState() {
  return {
    run: null, client: null, folder: "", seq: 0, steps: 0, step: 0, status: "", plan: "", phase: null, started: 0,
    ended: null, base: null, losses: [], smooth: [], validations: [], best: null, samples: [],
    kept: null, notices: [], saved: null, calibrated: null, marks: [], average: 0,
  };
}

const SMOOTHING = 0.9; // of the moving average; its start is corrected as in Adam's moments

function addLoss(state, step, loss) {
  state.step = step;
  if (loss === null) return; // it was not a finite number
  state.losses.push([step, loss]);
  const n = state.losses.length;
  state.average = state.average * SMOOTHING + loss * (1 - SMOOTHING);
  state.smooth.push([step, state.average / (1 - SMOOTHING ** n)]);
}

function addStep(state, { step, loss, time }) {
  addLoss(state, step, loss);
  if (loss === null) return;
  state.marks.push([time, step]);
  if (state.marks.length > 30) state.marks.shift();
}

function addValidation(state, event) {
  if (event.loss === null) return;
  state.validations.push([event.step, event.loss]);
  if (!state.best || event.loss < state.best[1]) state.best = [event.step, event.loss];
}

// What stands in a sentence may be words too: on, off.
function inWords({ text, template = text, values = {} }) {
  const said = Object.entries(values).map(([name, value]) => [name, say(String(value))]);
  return say(template, Object.fromEntries(said));
}

const HANDLERS = {
  status: (s, e) => { s.status = inWords(e); s.phase = null; },
  training: (s, e) => { // steps may have been auto until now
    const status = say("Training {steps} steps", e);
    Object.assign(s, { steps: e.steps, step: e.done, plan: s.status, status, phase: null });
  },
  resumed: (s, e) => {
    e.losses.forEach((loss, at) => addLoss(s, at + 1, loss));
    for (const [step, loss] of e.validations) addValidation(s, { step, loss });
  },
  warning: (s, e) => s.notices.push(e.text),
  progress: (s, e) => { s.phase = e; },
  base: (s, e) => { s.base = e.loss; },
  calibrated: (s, e) => { s.phase = null; s.status = ""; s.calibrated = e; },
  step: addStep,
  validation: addValidation,
  sample: (s, e) => s.samples.push({ step: e.step, file: e.file }),
  kept: (s, e) => { s.kept = e.step; },
  saved: (s, e) => { s.saved = e.path; },
  end: (s, e) => { s.ended = { ok: e.ok, text: e.text, time: e.time }; },
};

// Take one event into `state`, or answer "gap" when earlier ones are missing: the caller then reads
// the whole file.
export function accept(state, event) {
  if (event.type === "run") {
    const { run, client, folder, seq, steps, started } = event;
    Object.assign(state, emptyState(), { run, client, folder, seq, steps, started });
    return "ok";
  }
  if (event.run !== state.run || event.seq > state.seq + 1) return "gap";
  if (event.seq <= state.seq) return "old";
  state.seq = event.seq;
  HANDLERS[event.type]?.(state, event);
  return "ok";
}

// Although those before it are missing.
export function acceptAnyway(state, event) {
  if (accept(state, event) !== "gap") return;
  if (state.run && event.run < state.run) return; // what is left of an earlier one
  if (event.run !== state.run) Object.assign(state, emptyState(), { run: event.run });
  state.seq = event.seq - 1;
  accept(state, event);
}

// A run is named by the time at which it began, in digits of one length.
export const isLater = ({ run }, shown) => !shown.run || run > shown.run;

// Whether what was read says more than what is shown.
export const isNewer = (read, shown) => (
  Boolean(read.run) && (isLater(read, shown) || (read.run === shown.run && read.seq > shown.seq)));

export function speed(state) {
  const [first, last] = [state.marks[0], state.marks.at(-1)];
  if (state.marks.length < 4 || last[0] <= first[0]) return null;
  return (last[1] - first[1]) / (last[0] - first[0]);
}

function clock(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const [h, m] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

// The state in words: what it is doing, and its numbers.
export function headline(state) {
  if (state.ended) {
    const ended = say(state.ended.text);
    const kept = state.saved && state.ended.text.startsWith("Cancelled");
    return kept ? say("{ended} in {path}", { ended, path: state.saved }) : ended;
  }
  if (state.phase) {
    const phase = say(state.phase.phase);
    const text = say("{phase}: {done} of {total}", { ...state.phase, phase });
    return text[0].toUpperCase() + text.slice(1);
  }
  return state.status || say("Starting");
}

// The same without what counts up.
export function spoken(state) {
  if (!state.run) return "";
  return state.phase && !state.ended ? say(state.phase.phase) : headline(state);
}

export function numbers(state) {
  const parts = [];
  if (state.steps) parts.push(say("step {step}/{steps}", state));
  // What was told last before training: what it takes of the memory and how long.
  if (state.plan && !state.step && !state.ended) parts.push(state.plan);
  const rate = speed(state);
  if (rate && !state.ended) {
    parts.push(rate >= 1
      ? say("{rate} steps/s", { rate: rate.toFixed(1) })
      : say("{seconds} s/step", { seconds: (1 / rate).toFixed(1) }));
    parts.push(say("{time} left", { time: clock((state.steps - state.step) / rate) }));
  }
  if (state.calibrated && !state.steps) parts.push(...calibration(state.calibrated));
  if (state.ended && state.started) {
    parts.push(say("{time} in all", { time: clock(state.ended.time - state.started) }));
  }
  if (state.base) parts.push(say("base {loss}", { loss: state.base.toFixed(4) }));
  if (state.best) parts.push(bestText(state.best));
  return parts.join(" · ");
}

const bestText = ([step, loss]) => (
  say("best {loss} at step {step}", { loss: loss.toFixed(4), step }));

function calibration({ base_loss: before, loss: after, ranks }) {
  const all = Object.values(ranks);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const rank = low === high ? low : say("{low} to {high}", { low, high });
  const layers = say("{count} layers, rank {rank}", { count: all.length, rank });
  if (before === null || after === null) return [layers];
  const percent = Math.abs(100 * (after / before - 1)).toFixed(0);
  const change = `${after < before ? "−" : "+"}${percent} %`;
  const losses = `${before.toFixed(4)} → ${after.toFixed(4)} (${change})`;
  return [say("loss {losses}", { losses }), layers];
}

// The chart for those who do not see it; empty when there is nothing to draw.
export function lossText(state) {
  if (!state.losses.length && !state.validations.length) return "";
  const text = say("Loss over {step} steps", state);
  return state.best ? `${text}, ${bestText(state.best)}` : text;
}

const MOST_POINTS = 2000; // of a line: more are no wider than a pixel, and every message draws anew

function thinned(points) {
  const every = Math.ceil(points.length / MOST_POINTS);
  return points.filter((_, at) => (points.length - 1 - at) % every === 0);
}

// Columns for the chart: steps, raw, smoothed, validation, best, base; null where no value is.
export function columns(state) {
  const [losses, smooth] = [thinned(state.losses), thinned(state.smooth)];
  const measured = [...losses, ...state.validations].map(([step]) => step);
  const steps = [...new Set(measured)].sort((a, b) => a - b);
  const column = (points) => {
    const at = new Map(points);
    return steps.map((step) => at.get(step) ?? null);
  };
  return [steps, column(losses), column(smooth), column(state.validations),
    column(state.best ? [state.best] : []), steps.map(() => state.base)];
}

const LAYER = new RegExp(
  "^(?:(down|up)_blocks\\.(\\d+)|(mid)_block)\\.attentions\\.(\\d+)\\." +
  "transformer_blocks\\.(\\d+)\\." +
  "(attn1|attn2|ff)\\.(?:to_|net\\.)(q|k|v|out\\.0|0\\.proj|2)$",
);
const CONVOLUTION = new RegExp(
  "^(?:(down|up)_blocks\\.(\\d+)|(mid)_block)\\." +
  "(?:resnets\\.(\\d+)\\.conv([12])|(?:down|up)samplers\\.0\\.conv)$",
);
const QKV = [["q", "q"], ["k", "k"], ["v", "v"], ["out.0", "out"]];
const GROUPS = {
  conv: [() => say("convolutions"), [["1", "1"], ["2", "2"], ["resize", "resize"]]],
  attn1: [() => say("self-attention"), QKV],
  attn2: [() => say("cross-attention"), QKV],
  ff: [() => say("feed-forward"), [["0.proj", "in"], ["2", "out"]]],
};
const SIDES = ["down", "mid", "up"];

// A UNet's layers as a table: groups `[name, columns]`, columns `{ name, first of its group }`, and
// rows `{ name, cells }` in the order in which the signal meets them; a cell is a layer's name, or
// undefined where it has no adapter. Names of another kind are left out.
export function rankRows(ranks) {
  const rows = new Map();
  const put = (place, key, layer) => {
    const row = rows.get(place.join()) ?? { place, layers: {} };
    row.layers[key] = layer;
    rows.set(place.join(), row);
  };
  const resizing = [];
  for (const layer of Object.keys(ranks)) {
    const found = LAYER.exec(layer) ?? CONVOLUTION.exec(layer);
    if (!found) continue;
    const [, side, block, mid, index, inside, group, projection] = found;
    const at = [SIDES.indexOf(side ?? mid), +(block ?? 0)];
    if (group) put([...at, +index, +inside], `${group}.${projection}`, layer);
    else if (index) put([...at, +index, 0], `conv.${inside}`, layer);
    else resizing.push([at, layer]);
  }
  for (const [at, layer] of resizing) { // with the last of its block
    const beside = [...rows.values()].map(({ place }) => place)
      .filter(([side, block]) => side === at[0] && block === at[1]);
    put([...at, Math.max(0, ...beside.map((place) => place[2])), 0], "conv.resize", layer);
  }
  const inOrder = [...rows.values()].sort((a, b) => {
    const i = a.place.findIndex((value, at) => value !== b.place[at]);
    return i < 0 ? 0 : a.place[i] - b.place[i];
  });
  const used = Object.entries(GROUPS).filter(([group]) =>
    inOrder.some(({ layers }) => Object.keys(layers).some((key) => key.startsWith(`${group}.`))));
  const keys = used.flatMap(([group, [, names]]) => names.map(([key]) => `${group}.${key}`));
  return {
    groups: used.map(([, [name, names]]) => [name(), names.length]),
    columns: used.flatMap(([, [, names]]) =>
      names.map(([, name], i) => ({ name, first: i === 0 }))),
    rows: inOrder.map(({ place, layers }) => ({
      name: rowName(place, inOrder),
      cells: keys.map((key) => layers[key]),
    })),
  };
}

function rowName([side, block, attention, transformer], rows) {
  const deep = rows.some(({ place }) => place[3] > 0) ? `.${transformer}` : "";
  if (side === 1) return (attention ? `mid ${attention}` : "mid") + deep; // as the picture has it
  return `${SIDES[side]} ${block}.${attention}${deep}`;
}
