"""The real front end in a real browser: opens templates, presses buttons, measures what is on the page."""
from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HARMLESS = ("Failed to load resource", "ComfyApp graph accessed before initialization",  # core's own
            "Content Security Policy", "Fetch API cannot load https://huggingface.co")  # it asks for a file's size
READY = "() => window.app?.vueAppReady && window.app?.graph?.nodes && window.app?.canvas"
RECTANGLES = """() => {
  const canvas = window.app.canvas, scale = canvas.ds.scale, [dx, dy] = canvas.ds.offset;
  const frame = canvas.canvas.getBoundingClientRect();
  return window.app.graph.nodes.map(node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    const bounds = drawn ? [(drawn.x - frame.x) / scale - dx, (drawn.y - frame.y) / scale - dy,
                            drawn.width / scale, drawn.height / scale] : [...node.boundingRect];
    return {id: node.id, type: node.type, name: node.title, rectangle: bounds, drawn: Boolean(drawn)};
  });
}"""
WIDGETS = """() => Object.fromEntries(
  window.app.graph.nodes.map(node => [node.id, node.serialize().widgets_values ?? []]))"""
WIRE = """([checkpoint, words]) => {
  const graph = window.app.graph, [node] = graph.nodes;
  const put = (kind, values) => {
    const made = window.LiteGraph.createNode(kind);
    graph.add(made);
    for (const widget of made.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
    return made;
  };
  const model = put('MixologyDemoCheckpoint', {name: checkpoint});
  const picture = put('MixologyDemoPicture', {caption: words});
  const size = put('EmptyLatentImage', {width: 128, height: 128});
  const sources = {MODEL: [model, 0], CLIP: [model, 1], VAE: [model, 2], CLIP_VISION: [model, 3], IMAGE: [picture, 0],
                   LATENT: [size, 0]};
  node.inputs.forEach((input, slot) => {
    if (sources[input.type]) sources[input.type][0].connect(sources[input.type][1], node, slot);
  });
  for (const widget of node.widgets ?? []) if (typeof widget.value === 'string' && !widget.value) widget.value = words;
  node.connect(0, put('SaveImage', {}), 0);
}"""
FIT = """() => {
  const canvas = window.app.canvas, nodes = window.app.graph.nodes;
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const low = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  canvas.ds.scale = Math.min(1500 / (right + 60), 900 / (low + 80), 1);
  canvas.ds.offset[0] = 20; canvas.ds.offset[1] = 60;
  canvas.setDirty(true, true);
}"""


@dataclass(frozen=True)
class Box:
    """A node as the page shows it, in the canvas's own units, title included."""

    name: str
    kind: str
    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        return (self.x < other.x + other.width and other.x < self.x + self.width
                and self.y < other.y + other.height and other.y < self.y + self.height)


@dataclass
class Gui:
    """One page of the front end."""

    page: Any
    errors: list[str] = field(default_factory=list)

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_function(READY, timeout=120_000)

    def set(self, setting: str, value: Any) -> None:
        self.page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [setting, value])

    def command(self, name: str) -> None:
        self.page.evaluate("name => window.app.extensionManager.command.execute(name)", name)

    def load(self, path: Path) -> None:
        """A workflow file, as if it were dropped on the page."""
        self.errors.clear()
        self.page.evaluate("graph => window.app.loadGraphData(graph)", json.loads(path.read_text(encoding="utf-8")))
        self.page.evaluate(FIT)

    def boxes(self, modern: bool) -> list[Box]:
        """All nodes' rectangles once they stand still."""
        seen: list[Box] = []
        for _ in range(40):
            found = self.page.evaluate(RECTANGLES)
            boxes = [Box(node["name"], node["type"], *node["rectangle"]) for node in found]
            if boxes == seen and all(node["drawn"] == modern for node in found):
                return boxes
            seen = boxes
            time.sleep(0.15)
        raise AssertionError(f"the nodes do not come to rest: {seen}")

    def widgets(self) -> dict[str, list[Any]]:
        return {str(key): list(values) for key, values in self.page.evaluate(WIDGETS).items()}

    def missing_nodes(self) -> list[str]:
        return list(self.page.evaluate(
            "() => window.app.graph.nodes.map(n => n.type).filter(t => !window.LiteGraph.registered_node_types[t])"))

    def browse_templates(self, pack: str) -> set[str]:
        """Opens the dialog on a pack's page; the titles of its cards."""
        self.command("Comfy.BrowseTemplates")
        self.page.get_by_role("dialog").get_by_text(pack, exact=True).first.click()
        cards = self.page.locator("[data-testid^='template-workflow-']")
        self.page.locator("[data-testid^='template-workflow-MagicMix']").first.wait_for()
        seen = -1
        while cards.count() != seen or not seen:  # more are drawn as the list is scrolled
            seen = cards.count()
            if seen:
                cards.last.scroll_into_view_if_needed()
            time.sleep(0.3)
        return {str(card.get_attribute("data-testid")).removeprefix("template-workflow-") for card in cards.all()}

    def open_template(self, pack: str, title: str) -> None:
        """As a person does: the dialog, the pack, the card."""
        self.errors.clear()
        self.browse_templates(pack)
        self.page.locator(f"[data-testid='template-workflow-{title}']").click()
        self.page.wait_for_function(
            "title => window.app.extensionManager.workflow.activeWorkflow?.filename?.startsWith(title)", arg=title)
        self.page.wait_for_function("() => window.app.graph.nodes.length > 0")

    def run(self, seconds: float = 120.0) -> list[str]:
        """Presses Run and waits; the addresses of the pictures that were saved."""
        self.page.evaluate("""() => {
          window.mixologyEnd = null;
          for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
            window.app.api.addEventListener(
              kind, event => { window.mixologyEnd ??= [kind, event.detail]; }, {once: true});
        }""")
        self.page.locator("[data-testid='queue-button']").first.click()
        self.page.wait_for_function("() => window.mixologyEnd", timeout=seconds * 1000)
        kind, detail = self.page.evaluate("() => window.mixologyEnd")
        assert kind == "execution_success", detail
        images = self.page.evaluate(
            "() => Object.values(window.app.nodeOutputs).flatMap(out => out.images ?? [])")
        home = self.page.url.split("?")[0].split("#")[0].rstrip("/")
        return [f"{home}/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
                for image in images if image["type"] == "output"]

    def select(self, kind: str) -> None:
        """The first node of a class."""
        self.page.evaluate(
            "kind => window.app.canvas.selectNode(window.app.graph.nodes.find(node => node.type === kind))", kind)

    def search(self, words: str, add: bool = False) -> list[str]:
        """The display names of the nodes that the search box offers, best first; `add` puts its first entry, a
        blueprint perhaps, on the canvas."""
        self.command("Workspace.SearchBox.Toggle")
        self.page.get_by_role("dialog").locator("input").first.wait_for()
        self.page.keyboard.type(words)
        time.sleep(0.8)
        found = [item.inner_text().splitlines() for item in self.page.get_by_test_id("result-item").all()]
        self.page.keyboard.press("Enter" if add else "Escape")
        self.page.get_by_role("dialog").locator("input").first.wait_for(state="detached")
        if add:
            self.page.mouse.click(800, 500)  # where the node is put down
            self.page.wait_for_function("() => window.app.graph.nodes.length > 0")
        return [lines[0] for lines in found if add or lines[1] != "Blueprint"]

    def wire(self, checkpoint: str, words: str) -> None:
        """Gives the only node of the canvas a demo checkpoint, pictures and a size, words, and a place to save."""
        self.page.evaluate(WIRE, [checkpoint, words])

    def read_help(self, kind: str) -> str:
        """The help page of the first node of a class, opened by its info button."""
        button = self.page.get_by_test_id("info-button")
        for _ in range(20):  # a page that has just been opened loses its selection once more
            self.select(kind)
            time.sleep(0.5)
            if button.count():
                break
        button.click()
        page = self.page.locator(".node-help-content, [class*='node-help']").first
        page.locator("h1, h2, h3").first.wait_for()
        return str(page.inner_text())

    def read_tooltips(self, kind: str) -> list[str]:
        """What the input sockets of the first node of a class say in Nodes 2.0, those of widgets aside."""
        self.set("LiteGraph.Node.TooltipDelay", 0)
        number = self.page.evaluate("kind => window.app.graph.nodes.find(node => node.type === kind).id", kind)
        sockets = self.page.locator(f"[data-node-id='{number}'] .lg-slot--input:not(.lg-node-widget *)")
        sockets.first.wait_for()
        tooltips = []
        for socket in sockets.all():
            self.page.mouse.move(2, 2)
            self.page.locator(".p-tooltip").wait_for(state="detached")
            socket.hover()
            self.page.locator(".p-tooltip").first.wait_for()
            tooltips.append(str(self.page.locator(".p-tooltip").first.inner_text()))
        return tooltips


def start(program: str) -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program or None, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser: Any) -> Gui:
    """A page whose console errors are kept."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(90_000)  # beside other tests a page may be slow
    gui = Gui(page)

    def note(message: Any) -> None:
        if message.type == "error" and not any(words in message.text for words in HARMLESS):
            gui.errors.append(message.text)

    gui.page.on("console", note)
    gui.page.on("pageerror", lambda error: gui.errors.append(str(error)))
    return gui
