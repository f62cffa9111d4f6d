// Shows on a node the table that it measured, in letters of one width, as text that can be copied.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NODES = ["MixologyImageMetrics", "MixologyClipMetrics"];
const WIDGET = "$$mixology-report";
const LINE = 13;
const LETTERS = 66; // of a line
const MOST_LINES = 24; // more are scrolled
const SHARED = 60; // for each text beside it: Nodes 2.0 shares a node's height among them

function addReport(node) {
  const widget = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget;
  widget.serialize = false; // neither in a saved workflow nor in a prompt
  widget.options.serialize = false;
  widget.serializeValue = () => undefined;
  widget.label = "\u00a0"; // its name would say nothing
  const field = widget.inputEl ?? widget.element;
  if (field) {
    field.readOnly = true;
    field.style.fontFamily = "monospace";
    field.style.fontSize = "10px";
  }
  widget.options.read_only = true;
  return widget;
}

function show(node, text) {
  const widget = node.widgets?.find((other) => other.name === WIDGET) ?? addReport(node);
  widget.value = text;
  const lines = text.split("\n").reduce((count, line) => count + Math.max(1, Math.ceil(line.length / LETTERS)), 1);
  widget.options.getMinHeight = () => LINE * Math.min(MOST_LINES, lines);
  const [width, height] = node.computeSize();
  const texts = node.widgets.filter((other) => other.inputEl ?? other.element).length;
  const room = window.LiteGraph?.vueNodesMode ? SHARED * texts : 0;
  node.setSize([Math.max(node.size[0], width, 440), Math.max(node.size[1], height + room)]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "Mixology.Reports",
  beforeRegisterNodeDef(kind, definition) {
    if (!NODES.includes(definition.name)) return;
    const before = kind.prototype.onExecuted;
    kind.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      const text = output?.text;
      if (text?.length) show(this, Array.isArray(text) ? text.join("\n") : String(text));
    };
  },
});
