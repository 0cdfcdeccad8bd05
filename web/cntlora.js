// CNTLoRA in ComfyUI's page: a panel on the nodes that take time. It only shows; the graph runs the same without it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Panel } from "./panel.js";

const PANELS = { CNTLoRATrain: { chart: true, height: 280 }, CNTLoRACalibrate: { chart: false, height: 260 } };
const panels = new WeakMap(); // node -> panel

const root = () => app.rootGraph ?? app.graph;
const workflowId = () => root()?.id ?? ""; // tells two open tabs apart whose nodes have the same ids

// The node of an execution id: "7", or "12:5" for node 5 inside subgraph node 12. Ids stay strings.
function nodeOf(executionId) {
  const path = executionId.split(":");
  let graph = root();
  for (const id of path.slice(0, -1)) graph = find(graph, id)?.subgraph;
  return find(graph, path.at(-1));
}

function find(graph, id) {
  return graph?.nodes?.find((node) => String(node.id) === id);
}

function executionIdOf(wanted, graph = root(), prefix = "") {
  for (const node of graph?.nodes ?? []) {
    if (node === wanted) return prefix + node.id;
    const inside = node.subgraph && executionIdOf(wanted, node.subgraph, `${prefix}${node.id}:`);
    if (inside) return inside;
  }
  return null;
}

async function readRun(node) {
  const id = executionIdOf(node);
  if (id === null) return [];
  const answer = await api.fetchApi(`/cntlora/events?${new URLSearchParams({ workflow: workflowId(), node: id, class: node.comfyClass })}`);
  return answer.ok ? (await answer.json()).events : [];
}

function pictureAddress(folder, file) {
  return api.apiURL(`/view?type=temp&subfolder=${encodeURIComponent(folder)}&filename=${encodeURIComponent(file)}`);
}

function addPanel(node, { chart, height }) {
  const panel = new Panel({ chart, read: () => readRun(node), picture: pictureAddress });
  panel.root.style.minHeight = `${height}px`; // the Vue renderer asks the element, the canvas asks getMinHeight
  const widget = node.addDOMWidget("cntlora_panel", "cntlora", panel.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
  });
  widget.serialize = false;
  panels.set(node, panel);
  const removed = node.onRemoved;
  node.onRemoved = function (...values) {
    panel.destroy();
    return removed?.apply(this, values);
  };
  setTimeout(() => panel.replay().catch(() => {}), 0); // when the node has its id
}

function styles() {
  for (const file of ["./vendor/uplot/uPlot.min.css", "./cntlora.css"]) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(file, import.meta.url).href;
    document.head.append(link);
  }
}

app.registerExtension({
  name: "cntlora.panel",
  setup() {
    styles();
    api.addEventListener("cntlora.event", ({ detail }) => {
      if (detail.workflow !== workflowId()) return;
      const node = nodeOf(detail.node);
      if (node?.comfyClass === detail.class) panels.get(node)?.take(detail.events);
    });
  },
  nodeCreated(node) {
    const wanted = PANELS[node.comfyClass];
    if (wanted) addPanel(node, wanted);
  },
});
