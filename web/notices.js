// Gives a notice the room it needs, and takes it off its node when that node runs again. The host shows texts on nodes,
// two lines of them, and never takes one away.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SIGN = "\u26a0 Mixology: "; // as in host/notices.py
const WIDGET = "$$node-text-preview"; // the host's name of the text on a node
const LETTER = 6.5; // about the size of the host's letters in such a text, in pixels
const LINE = 16;
const told = new Map(); // by a node's id: the run that last told of it, its height before and with the text
let run = null;

function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) { // a subgraph's node, then the node in it
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function findText(node) {
  const index = node?.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1;
  return index >= 0 && String(node.widgets[index].value).startsWith(SIGN) ? index : -1;
}

function setHeight(node, height) {
  if (!window.LiteGraph?.vueNodesMode) node.setSize([node.size[0], height]); // there the text makes its own room
  node.setDirtyCanvas?.(true, true);
}

function makeRoom(id) {
  const node = findNode(id);
  const index = findText(node);
  if (index < 0) return;
  const widget = node.widgets[index];
  const letters = Math.max(1, Math.floor((node.size[0] - 50) / LETTER));
  const height = 2 * LINE + LINE * Math.ceil(widget.value.length / letters);
  widget.options.getMinHeight = () => height;
  const entry = told.get(id);
  entry.before ??= node.size[1];
  entry.after = Math.max(node.size[1], node.computeSize()[1]);
  setHeight(node, entry.after);
}

function clear(id, { before, after }) {
  const node = findNode(id);
  const index = findText(node);
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
  setHeight(node, node.size[1] === after ? before : node.size[1]);
}

app.registerExtension({
  name: "Mixology.Notices",
  setup() {
    api.addEventListener("execution_start", ({ detail }) => {
      run = detail.prompt_id;
    });
    api.addEventListener("progress_text", ({ detail }) => {
      const id = String(detail.nodeId);
      if (!detail.text.startsWith(SIGN)) return;
      told.set(id, { ...told.get(id), run });
      requestAnimationFrame(() => makeRoom(id)); // by then the host has put it there
    });
    api.addEventListener("executing", ({ detail }) => {
      const id = String(detail);
      const entry = told.get(id);
      if (entry && entry.run !== run) {
        told.delete(id);
        clear(id, entry);
      }
    });
  },
});
