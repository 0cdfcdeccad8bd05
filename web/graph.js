// Nodes by execution id: "7", or "12:5" for node 5 inside subgraph node 12. Ids stay strings.

export function nodeOf(root, executionId) {
  const path = String(executionId).split(":");
  let graph = root;
  for (const id of path.slice(0, -1)) graph = find(graph, id)?.subgraph;
  return find(graph, path.at(-1));
}

function find(graph, id) {
  return graph?.nodes?.find((node) => String(node.id) === id);
}

// What a node was called before it was put into its subgraph, where it kept its own number; null
// where it is in none, or another node has that name.
export function formerIdOf(root, executionId) {
  const path = executionId.split(":");
  const former = [...path.slice(0, -2), path.at(-1)].join(":");
  return path.length < 2 || nodeOf(root, former) ? null : former;
}

// Every node, those inside subgraphs too.
export function* everyNode(graph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    yield* everyNode(node.subgraph);
  }
}

export function executionIdOf(graph, wanted, prefix = "") {
  for (const node of graph?.nodes ?? []) {
    if (node === wanted) return prefix + node.id;
    const inside = node.subgraph && executionIdOf(node.subgraph, wanted, `${prefix}${node.id}:`);
    if (inside) return inside;
  }
  return null;
}
