// What a run has reported so far, as plain data. No DOM here.

export function emptyState() {
  return {
    run: null, folder: "", seq: 0, steps: 0, step: 0, status: "", phase: null, started: 0, ended: null,
    base: null, losses: [], smooth: [], validations: [], best: null, samples: [], notices: [], saved: null,
    marks: [], average: 0,
  };
}

const SMOOTHING = 0.9; // of the moving average; corrected for its start, as Adam corrects its moments

function addStep(state, event) {
  state.step = event.step;
  state.losses.push([event.step, event.loss]);
  const n = state.losses.length;
  state.average = state.average * SMOOTHING + event.loss * (1 - SMOOTHING);
  state.smooth.push([event.step, state.average / (1 - SMOOTHING ** n)]);
  state.marks.push([event.time, event.step]);
  if (state.marks.length > 30) state.marks.shift();
}

function addValidation(state, event) {
  state.validations.push([event.step, event.loss]);
  if (!state.best || event.loss < state.best[1]) state.best = [event.step, event.loss];
}

const HANDLERS = {
  status: (s, e) => { s.status = e.text; s.phase = null; },
  training: (s, e) => { s.status = `Training ${e.steps} steps`; s.phase = null; },
  warning: (s, e) => s.notices.push(e.text),
  progress: (s, e) => { s.phase = e; },
  base: (s, e) => { s.base = e.loss; },
  calibrated: (s) => { s.phase = null; },
  step: addStep,
  validation: addValidation,
  sample: (s, e) => s.samples.push({ step: e.step, file: e.file }),
  saved: (s, e) => { s.saved = e.path; },
  end: (s, e) => { s.ended = { ok: e.ok, text: e.text, time: e.time }; },
};

// Take one event into `state`, or answer "gap" when earlier ones are missing: the caller then reads the whole file.
export function accept(state, event) {
  if (event.type === "run") {
    Object.assign(state, emptyState(), { run: event.run, folder: event.folder, seq: event.seq, steps: event.steps, started: event.started });
    return "ok";
  }
  if (event.run !== state.run || event.seq > state.seq + 1) return "gap";
  if (event.seq <= state.seq) return "old";
  state.seq = event.seq;
  HANDLERS[event.type]?.(state, event);
  return "ok";
}

export function speed(state) {
  const [first, last] = [state.marks[0], state.marks.at(-1)];
  return state.marks.length >= 4 && last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : null;
}

function clock(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const [h, m] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return (h ? `${h}:${String(m).padStart(2, "0")}` : `${m}`) + `:${String(s % 60).padStart(2, "0")}`;
}

// The state in words: what it is doing, and its numbers.
export function headline(state) {
  if (!state.run) return "Not run in this workflow yet";
  if (state.ended) return state.ended.text + (state.saved ? ` in loras/${state.saved}` : "");
  if (state.phase) return `${state.phase.phase[0].toUpperCase()}${state.phase.phase.slice(1)}: ${state.phase.done} of ${state.phase.total}`;
  return state.status || "Starting";
}

export function numbers(state) {
  const parts = [];
  if (state.steps) parts.push(`step ${state.step}/${state.steps}`);
  const rate = speed(state);
  if (rate && !state.ended) {
    parts.push(rate >= 1 ? `${rate.toFixed(1)} steps/s` : `${(1 / rate).toFixed(1)} s/step`);
    parts.push(`${clock((state.steps - state.step) / rate)} left`);
  }
  if (state.ended && state.started) parts.push(`${clock(state.ended.time - state.started)} in all`);
  if (state.base) parts.push(`base ${state.base.toFixed(4)}`);
  if (state.best) parts.push(`best ${state.best[1].toFixed(4)} at step ${state.best[0]}`);
  return parts.join(" · ");
}

// Columns for the chart: steps, raw, smoothed, validation, best, base; null where there is no value.
export function columns(state) {
  const steps = [...new Set([...state.losses, ...state.validations].map(([step]) => step))].sort((a, b) => a - b);
  const column = (points) => { const at = new Map(points); return steps.map((step) => at.get(step) ?? null); };
  return [steps, column(state.losses), column(state.smooth), column(state.validations),
    column(state.best ? [state.best] : []), steps.map(() => state.base)];
}
