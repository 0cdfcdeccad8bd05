// Names of nodes without a page: `node --test tests/web`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const source = readFileSync(new URL("../../web/graph.js", import.meta.url), "utf8");
const { executionIdOf, formerIdOf, nodeOf } =
  await import(`data:text/javascript,${encodeURIComponent(source)}`);

const train = { id: 5 };
const inner = { id: 30, subgraph: { nodes: [{ id: 7 }] } };
const root = { nodes: [{ id: 4 }, { id: 12, subgraph: { nodes: [train, inner] } }] };

test("a node in a subgraph is named by its way there", () => {
  assert.equal(executionIdOf(root, train), "12:5");
  assert.equal(nodeOf(root, "12:5"), train);
  assert.equal(executionIdOf(root, { id: 5 }), null);
});

test("what was put into a subgraph had its own number outside, unless another has it", () => {
  assert.equal(formerIdOf(root, "12:5"), "5");
  assert.equal(formerIdOf(root, "12:30:7"), "12:7");
  assert.equal(formerIdOf({ nodes: [...root.nodes, { id: 5 }] }, "12:5"), null);
  assert.equal(formerIdOf(root, "4"), null);
});
