// CNTLoRA in ComfyUI's page: panels and words on our nodes. It only shows; the graph runs the same
// without it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { readRun, readWords, readWorkflow } from "./api_client.js";
import { everyNode, executionIdOf, formerIdOf, nodeOf } from "./graph.js";
import { Panel } from "./panel.js";
import { say, useWords } from "./say.js";
import { Words } from "./words.js";

const PANELS = {
  CNTLoRATrain: { kind: "train", width: 420, height: 330 },
  CNTLoRACalibrate: { kind: "calibrate", width: 380, height: 230 },
};
const WORDS = {
  CNTLoRASubjectImages: () => (
    say("After a run: how many pictures, their sizes, the prompt, what was skipped")),
  CNTLoRASaveLoRA: () => say("After a run: the name of the file"),
};
const KEPT = ["CNTLoRASaveLoRA"]; // of those with words: the server keeps what they said last
const WIDGET_HEIGHT = 20;
const TEXT_HEIGHT = 80; // of a widget that is an element
const REJECTED_WITHIN = 8000; // ms in which a prompt that was just sent is refused, if it is

const shown = new WeakMap(); // node -> Panel or Words

const root = () => app.rootGraph ?? app.graph;
const workflowId = () => root()?.id ?? ""; // tells tabs with the same node ids apart

function shownOf({ node: id, class: kind }) {
  const node = nodeOf(root(), id);
  return node?.comfyClass === kind ? shown.get(node) : undefined;
}

// A run also tells what the nodes before had shown: a page that is loaded anew has lost it.
async function lastRun(node) {
  const id = executionIdOf(root(), node);
  if (id === null) return [];
  const source = { workflow: workflowId(), class: node.comfyClass, client: api.clientId ?? "" };
  let events = await readRun({ ...source, node: id });
  const former = formerIdOf(root(), id);
  if (!events.length && former) events = await readRun({ ...source, node: former });
  if (executionIdOf(root(), node) !== id) return events; // another graph is open by now
  for (const trace of events[0]?.before ?? []) shownOf(trace)?.retrace(trace, { older: false });
  return events;
}

// `hideInPanel`: the properties panel would take the element out of the node for good.
function addElement(node, name, display, height) {
  display.root.style.minHeight = `${height}px`; // the Vue renderer asks the element
  const widget = node.addDOMWidget(name, "cntlora", display.root, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    getMinHeight: () => height, // the canvas asks here
  });
  widget.serialize = false;
  shown.set(node, display);
  const removed = node.onRemoved;
  node.onRemoved = function (...values) {
    display.destroy();
    return removed?.apply(this, values);
  };
}

function addPanel(node, { kind, height }) {
  const panel = new Panel({ kind, read: () => lastRun(node) });
  addElement(node, "cntlora_panel", panel, height);
  replaySoon(node, panel);
}

function addWords(node, text) {
  const read = KEPT.includes(node.comfyClass) ? () => lastRun(node) : undefined;
  const words = new Words(text, read);
  addElement(node, "cntlora_words", words, 72);
  replaySoon(node, words);
}

// When the node has its id. Where Undo has made it anew the Vue renderer still shows the element of
// the one before.
function replaySoon(node, display) {
  setTimeout(() => {
    if (node.graph && node.graph === app.canvas?.graph) {
      const left = document.querySelector(`[data-node-id="${node.id}"] .cntlora-panel`);
      if (left && left !== display.root) left.replaceWith(display.root);
    }
    display.replay().catch(() => {});
  }, 0);
}

// The Vue renderer folds by `options.advanced`, the canvas by `advanced`, which leaves the row: it
// takes no height (4 are added to what a widget asks for) until Show Advanced in the node's menu.
function foldAdvanced(node) {
  for (const widget of node.widgets ?? []) {
    if (!widget.options?.advanced) continue;
    widget.advanced = true;
    const height = widget.element ? TEXT_HEIGHT : WIDGET_HEIGHT;
    widget.computeSize = (width) => [width ?? 0, node.showAdvanced ? height : -4];
  }
}

function styles() {
  for (const file of ["./vendor/uplot/uPlot.min.css", "./cntlora.css"]) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(file, import.meta.url).href;
    document.head.append(link);
  }
}

// Beside the graph; without a `life` (ms) until somebody closes it.
function toast(node, severity, detail, life) {
  app.extensionManager?.toast?.add({ severity, summary: node.title, detail, life });
}

// What is wrong with a node, in its own text and, for those that have none, beside the graph.
function tell(node, sentence) {
  shown.get(node)?.fail(sentence);
  toast(node, "error", sentence, 15000);
}

// Of a run's events, where they belong. A page that has a run of its own keeps it, although another
// page has the same file open; for a node without a panel there are only its warnings.
function take({ client, events, ...source }) {
  const display = shownOf(source);
  const own = client === api.clientId;
  if (display) {
    if (own || display.client !== api.clientId) display.take(events);
    return;
  }
  const node = nodeOf(root(), source.node);
  if (!own || node?.comfyClass !== source.class) return;
  for (const { type, text } of events) if (type === "warning") toast(node, "warn", text);
}

// The host names the input that it rejects; the sentence of ours lies in `details`.
function tellRejected() {
  const until = Date.now() + REJECTED_WITHIN;
  const look = () => {
    const rejected = Object.entries(app.lastNodeErrors ?? {});
    for (const [id, { errors, class_type: kind }] of rejected) {
      const node = nodeOf(root(), id);
      if (!kind?.startsWith("CNTLoRA") || !node) continue;
      const ours = errors.filter((error) => error.type === "custom_validation_failed");
      const sentences = ours.map((error) => error.details.replace(/^\w+ - /, ""));
      if (sentences.length) tell(node, [...new Set(sentences)].join(" "));
    }
    if (!rejected.length && Date.now() < until) setTimeout(look, 200);
  };
  setTimeout(look, 200);
}

// The host tells of a prompt whatever tab is open: another's nodes may have the same ids.
let running = { prompt: null, workflow: null };

async function isOfThisTab(prompt) {
  if (prompt !== running.prompt) { // begun before this page
    running = { prompt, workflow: readWorkflow(prompt) };
  }
  const workflow = await running.workflow;
  return workflow === undefined || workflow === workflowId();
}

const LISTENERS = {
  execution_start: ({ prompt_id: prompt }) => {
    running = { prompt, workflow: readWorkflow(prompt) };
  },
  "cntlora.event": ({ workflow, ...message }) => {
    if (workflow === workflowId()) take(message);
  },
  // Also for what ComfyUI's cache answers: the nodes then show what made the result, those before
  // this one too. (The cache answers a node of ours under its own id only.)
  executed: async ({ node, display_node: display, output, prompt_id: prompt }) => {
    if (!await isOfThisTab(prompt)) return;
    shown.get(nodeOf(root(), display ?? node))?.executed?.(output ?? {});
    for (const text of output?.cntlora_shown ?? []) {
      const trace = JSON.parse(text);
      shownOf(trace)?.retrace(trace);
    }
  },
  execution_error: async ({ prompt_id: prompt, node_id: id, ...error }) => {
    if (!await isOfThisTab(prompt)) return;
    const node = nodeOf(root(), id);
    const sentence = error.exception_message?.trim() || error.exception_type;
    if (node?.comfyClass?.startsWith("CNTLoRA")) tell(node, sentence);
  },
  // What was sent meanwhile is lost, and the server may be another.
  reconnected: () => {
    for (const node of everyNode(root())) shown.get(node)?.replay({ anew: true }).catch(() => {});
  },
  promptQueueing: tellRejected,
};

// At once, not in setup(): a page that opens in the middle of a run hears from it before that.
for (const [type, listener] of Object.entries(LISTENERS)) {
  api.addEventListener(type, ({ detail }) => listener(detail));
}

app.registerExtension({
  name: "cntlora.panel",
  async init() {
    styles();
    useWords(await readWords(app.extensionManager.setting.get("Comfy.Locale") ?? "en"));
  },
  nodeCreated(node) {
    const kind = node.comfyClass ?? "";
    if (!kind.startsWith("CNTLoRA")) return;
    foldAdvanced(node);
    if (PANELS[kind]) addPanel(node, PANELS[kind]);
    if (WORDS[kind]) addWords(node, WORDS[kind]());
    node.setSize([Math.max(node.size[0], PANELS[kind]?.width ?? 0), node.computeSize()[1]]);
  },
});
