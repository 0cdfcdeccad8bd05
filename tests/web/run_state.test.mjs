// The panel's state without a page: `node --test tests/web`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const read = (name) => readFileSync(new URL(`../../web/${name}`, import.meta.url), "utf8");
const address = (source) => `data:text/javascript,${encodeURIComponent(source)}`;
const say = address(read("say.js"));
const {
  accept, acceptAnyway, columns, emptyState, headline, isNewer, lossText, numbers, rankRows, speed, spoken,
} =
  await import(address(read("run_state.js").replace("./say.js", say)));
const { useWords } = await import(say);

const start = { type: "run", run: "a", seq: 1, time: 100, steps: 10, started: 100, folder: "cntlora/7" };
const step = (n, loss, time = 100 + n) => ({ type: "step", run: "a", seq: n + 1, time, step: n, loss });

function stateAfter(...events) {
  const state = emptyState();
  for (const event of events) accept(state, event);
  return state;
}

// As the server numbers them after `start`.
const numbered = (events) => events.map((event, at) => ({ run: "a", seq: at + 2, ...event }));

test("events count once, in order", () => {
  const state = stateAfter(start, step(1, 0.5));
  assert.equal(accept(state, step(1, 0.5)), "old");
  assert.equal(accept(state, step(3, 0.3)), "gap");
  assert.equal(accept(state, step(2, 0.4)), "ok");
  assert.deepEqual(state.losses, [[1, 0.5], [2, 0.4]]);
});

test("a page that came late sees a gap, not a wrong chart", () => {
  assert.equal(accept(emptyState(), step(5, 0.1)), "gap");
});

test("a new run forgets the old one", () => {
  const state = stateAfter(start, step(1, 0.5), { ...start, run: "b" });
  assert.deepEqual([state.run, state.losses, state.step], ["b", [], 0]);
});

test("the moving average starts at the first loss and follows a level", () => {
  const state = stateAfter(start, ...Array.from({ length: 50 }, (_, i) => step(i + 1, 0.25)));
  for (const [, loss] of state.smooth) assert.ok(Math.abs(loss - 0.25) < 1e-12);
});

test("the lowest validation is the best, and has its point in the chart", () => {
  const validation = (seq, at, loss) => ({ type: "validation", run: "a", seq, time: 0, step: at, loss });
  const state = stateAfter(start, validation(2, 0, 0.3), validation(3, 5, 0.1), validation(4, 10, 0.2));
  assert.deepEqual(state.best, [5, 0.1]);
  const [steps, , , validations, best] = columns(state);
  assert.deepEqual([steps, validations, best], [[0, 5, 10], [0.3, 0.1, 0.2], [null, 0.1, null]]);
});

test("words and numbers", () => {
  assert.equal(lossText(emptyState()), "");
  const state = stateAfter(start, step(1, 0.5), step(2, 0.5), step(3, 0.5), step(4, 0.5));
  assert.equal(speed(state), 1);
  assert.match(numbers(state), /^step 4\/10 · 1\.0 steps\/s · 0:06 left/);
  accept(state, { type: "saved", run: "a", seq: 6, time: 105, path: "loras/cat.safetensors" });
  accept(state, { type: "end", run: "a", seq: 7, time: 3761, ok: false, text: "Cancelled; what was trained is kept" });
  assert.equal(headline(state), "Cancelled; what was trained is kept in loras/cat.safetensors");
  assert.match(numbers(state), /1:01:01 in all/);
});

const still = { ...start, steps: 0 };
const calibrated = (loss, ranks) => (
  { type: "calibrated", run: "a", seq: 2, time: 101, base_loss: 0.2, loss, ranks, energy: {} });

test("a calibration tells its loss before and after, its layers and their ranks", () => {
  assert.equal(
    numbers(stateAfter(still, calibrated(0.15, { a: 1, b: 9 }))),
    "loss 0.2000 → 0.1500 (−25 %) · 2 layers, rank 1 to 9",
  );
  assert.match(numbers(stateAfter(still, calibrated(null, { a: 4, b: 4 }))), /2 layers, rank 4$/);
});

test("the weights that were kept have their step", () => {
  const state = stateAfter(start, { type: "kept", run: "a", seq: 2, time: 0, step: 5 });
  assert.equal(state.kept, 5);
});

test("the rank map follows the signal, with a column for each kind of projection", () => {
  const layer = (place, kind) => `${place}.transformer_blocks.0.${kind}`;
  const [up, down, mid] = ["up_blocks.10.attentions.0", "down_blocks.2.attentions.1",
    "mid_block.attentions.0"];
  const ranks = Object.fromEntries([
    [layer(up, "attn1.to_q"), 4], [layer(mid, "ff.net.0.proj"), 2], [layer(down, "ff.net.2"), 3],
    ["another.layer", 1],
  ]);
  const { groups, columns: names, rows } = rankRows(ranks);
  assert.deepEqual(groups, [["self-attention", 4], ["feed-forward", 2]]);
  assert.deepEqual(names.map((c) => c.name), ["q", "k", "v", "out", "in", "out"]);
  assert.deepEqual(rows.map((row) => row.name), ["down 2.1", "mid", "up 10.0"]);
  assert.equal(rows[0].cells[5], layer(down, "ff.net.2"));
  assert.equal(rows[2].cells[5], undefined);
});

test("convolutions stand with the block after them", () => {
  const ranks = {
    "down_blocks.0.resnets.0.conv1": 1, "down_blocks.0.resnets.1.conv2": 2,
    "down_blocks.0.downsamplers.0.conv": 3, "mid_block.resnets.1.conv1": 4,
    "up_blocks.1.upsamplers.0.conv": 5,
  };
  const { groups, rows } = rankRows(ranks);
  assert.deepEqual(groups, [["convolutions", 3]]);
  assert.deepEqual(rows.map(({ name, cells }) => [name, ...cells.map((c) => ranks[c] ?? 0)]), [
    ["down 0.0", 1, 0, 0], ["down 0.1", 0, 2, 3], ["mid 1", 4, 0, 0], ["up 1.0", 0, 0, 5],
  ]);
});

test("what a run takes stands there until its first step", () => {
  const told = { type: "status", run: "a", seq: 2, text: "about 5.8 GB beside the model." };
  const training = { type: "training", run: "a", seq: 3, steps: 10, done: 0 };
  const state = stateAfter(start, told, training);
  assert.equal(headline(state), "Training 10 steps");
  assert.equal(numbers(state), "step 0/10 · about 5.8 GB beside the model.");
  accept(state, { ...step(1, 0.5), seq: 4 });
  assert.equal(numbers(state), "step 1/10");
});

test("the panel speaks the page's language, and English where the table has no word", (t) => {
  t.after(() => useWords());
  useWords({ "{phase}: {done} of {total}": "{total} 中的 {done}：{phase}", refining: "细化" });
  const phase = { type: "progress", run: "a", seq: 2, phase: "refining", done: 3, total: 9 };
  const state = stateAfter(start, phase);
  assert.equal(headline(state), "9 中的 3：细化");
  assert.equal(numbers(state), "step 0/10");
});

test("a run that goes on shows what it has behind it, and its speed without that", () => {
  const of = (seq, more) => ({ run: "a", seq, time: 100, ...more });
  const state = stateAfter(
    start,
    of(2, { type: "training", steps: 10, done: 4 }),
    of(3, { type: "resumed", losses: [0.5, null, 0.4, 0.3], validations: [[0, 0.6], [2, 0.2]] }),
  );
  assert.deepEqual([state.step, state.losses.length, state.best], [4, 3, [2, 0.2]]);
  assert.match(numbers(state), /^step 4\/10 · best 0\.2000 at step 2/);
  assert.equal(speed(state), null);
});

test("where it is kept is said of what was cancelled, once", () => {
  const ended = (text) => stateAfter(
    start,
    { type: "saved", run: "a", seq: 2, time: 1, path: "/mnt/output/cat.safetensors" },
    { type: "end", run: "a", seq: 3, time: 1, ok: false, text },
  );
  const cancelled = "Cancelled; what was trained is kept";
  assert.equal(headline(ended(cancelled)), `${cancelled} in /mnt/output/cat.safetensors`);
  assert.equal(headline(ended("It broke. Look in x.")), "It broke. Look in x.");
});

test("only what was read later, or further, takes the place of what is shown", () => {
  const shown = stateAfter({ ...start, run: "b" }, { ...step(1, 0.5), run: "b" });
  const read = (run, seq) => Object.assign(emptyState(), { run, seq });
  const newer = [["a", 9], ["b", 2], ["b", 3], ["c", 1], [null, 0]].map((r) => isNewer(read(...r), shown));
  assert.deepEqual(newer, [false, false, true, true, false]);
  assert.equal(isNewer(read("a", 1), emptyState()), true);
});

test("an event whose forerunners nobody has is taken all the same, none of an earlier run", () => {
  const state = stateAfter(start);
  acceptAnyway(state, step(7, 0.2));
  acceptAnyway(state, step(7, 0.2));
  acceptAnyway(state, { ...step(8, 0.9), run: "0" });
  assert.deepEqual([state.losses, state.seq], [[[7, 0.2]], 8]);
  acceptAnyway(state, { ...step(3, 0.4), run: "b" });
  assert.deepEqual([state.run, state.losses], ["b", [[3, 0.4]]]);
});

test("what is spoken does not count", () => {
  const progress = (seq, done) => (
    { type: "progress", run: "a", seq, time: 1, phase: "calibrating", done, total: 9 });
  const state = stateAfter(start, progress(2, 1));
  const first = spoken(state);
  accept(state, progress(3, 2));
  assert.equal(spoken(state), first);
  assert.notEqual(headline(state), spoken(state));
  assert.equal(spoken(emptyState()), "");
});

test("a status is said in the page's language, with the words among its values", () => {
  useWords({ "memory: {free}, checkpointing {how}": "Speicher: {free}, {how}", on: "an" });
  const state = stateAfter(start, ...numbered([{ type: "status", text: "memory: 3.5, checkpointing on",
      template: "memory: {free}, checkpointing {how}",
    values: { free: "3.5", how: "on" } }]));
  assert.equal(headline(state), "Speicher: 3.5, an");
  useWords({});
});

test("a calibration that has ended is no plan of the training after it", () => {
  const state = stateAfter(start, ...numbered([
    { type: "status", text: "Calibrating" },
    { type: "calibrated", base_loss: null, loss: null, ranks: { a: 4 } },
    { type: "training", steps: 12, done: 0 },
  ]));
  assert.equal(numbers(state), "step 0/12");
});

test("a line of many steps is drawn from some of them, the last among these", () => {
  const losses = Array.from({ length: 100000 }, (_, at) => at);
  const state = stateAfter(start, ...numbered([{ type: "resumed", losses, validations: [[7, 0.5]] }]));
  const [steps, raw] = columns(state);
  assert.ok(steps.length < 2100);
  assert.equal(steps.at(-1), 100000);
  assert.equal(raw.at(-1), 99999);
  assert.ok(steps.includes(7));
});
