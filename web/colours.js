// Gives the pack's own sockets and links a colour each, in both renderers and again after the theme has changed.
import { app } from "../../scripts/app.js";

const COLOURS = {
  MIXOLOGY_LAYOUT: "#e0a458",
  MIXOLOGY_TRAJECTORY: "#6fb7bf",
  MIXOLOGY_EXPERTS: "#d9707a",
  MIXOLOGY_MIXER: "#b58be0",
};

function paint() {
  Object.assign(app.canvas.default_connection_color_byType, COLOURS);
  Object.assign(app.canvas.constructor.link_type_colors, COLOURS);
  for (const [type, colour] of Object.entries(COLOURS)) { // where Nodes 2.0 looks
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour);
  }
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "Mixology.Colours",
  setup() {
    paint();
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint)); // the theme takes them away
  },
  afterConfigureGraph: paint, // the first theme may be laid on after the set-up
});
