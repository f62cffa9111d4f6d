"""A workflow under construction, in the GUI's own format, laid out in numbered groups from left to right.

Node definitions come from the host, so widget order is never typed here. Sizes are those of the larger of the GUI's
two renderers; the browser test measures both.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOCKETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}  # these show as widgets
GROWING = "COMFY_AUTOGROW_V3"  # shows as many sockets as are wired, and one more
SEEDS = ("seed", "noise_seed")
PREVIEWING = {"KSampler", "SamplerCustomAdvanced", "MixologyLayoutMixKSampler", "MixologyLayoutFromPrompt",
              "MixologyInvert", "MixologyCocktailKSampler", "MixologyGradientMask", "MixologySaliencyMaps",
              "MixologyDemoPicture", "MixologyImageMetrics", "MixologyClipMetrics",
              "MixologyLabelledGrid"}  # these grow while they run
PREVIEW, PICTURE, TITLE, MISSING = 280, 360, 30, 26  # MISSING: the line below a loader whose file is not there
BETWEEN, PAD, HEAD, APART = 64, 14, 50, 20  # nodes; a group's edge and its title; groups
NOTE = (760, 170)
CHANGE = {"color": "#223", "bgcolor": "#335"}
Link = tuple[int, int]  # node id, output slot


@dataclass
class Group:
    """A numbered column of nodes; `below` puts it under the one before it."""

    title: str
    width: int
    below: bool
    nodes: list[int] = field(default_factory=list)


@dataclass
class Graph:
    """A workflow under construction."""

    definitions: dict[str, Any]
    names: dict[str, str]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @contextlib.contextmanager
    def group(self, title: str, width: int = 280, below: bool = False) -> Iterator[None]:
        """What is added inside stands in one column under this title."""
        self.groups.append(Group(f"{len(self.groups) + 1}. {title}", width, below))
        yield

    def add(self, kind: str, role: str = "", /, *, change: bool = False, models: Sequence[dict[str, str]] = (),
            **inputs: Any) -> int:
        """One node in the open group; an input that is a `Link` is wired, a growing one takes several, any other is
        a widget's value. `role` follows the node's own name in its title; `change` colours it."""
        number = len(self.nodes) + 1
        sockets: list[dict[str, Any]] = []
        widgets: list[Any] = []
        definition = self.definitions[kind]
        needed = definition.INPUT_TYPES()
        for name, spec in {**needed.get("required", {}), **needed.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list) or spec[0] in SOCKETS:
                wired = isinstance(inputs.get(name), tuple)
                widgets += widget_values(name, spec, {} if wired else inputs)
                if wired:
                    kind_of = "COMBO" if isinstance(spec[0], list) else spec[0]
                    sockets.append({"name": name, "type": kind_of, "widget": {"name": name},
                                    "link": self.connect(inputs[name], number, len(sockets), kind_of)})
            elif spec[0] == GROWING:
                sockets += self.grow(name, options["template"], inputs[name], number, len(sockets))
            else:
                link = None
                if isinstance(inputs.get(name), tuple):
                    link = self.connect(inputs[name], number, len(sockets), spec[0])
                sockets.append({"name": name, "type": spec[0], "link": link,
                                **({"shape": 7} if name in needed.get("optional", {}) else {})})
        labels = getattr(definition, "RETURN_NAMES", None) or definition.RETURN_TYPES
        group = self.groups[-1]
        group.nodes.append(number)
        own = re.sub(r" \(Prompt\)$", "", self.names.get(kind, kind))
        self.nodes.append({
            "id": number, "type": kind, **({"title": f"{own} ({role})"} if role else {}), "pos": [0, 0],
            "size": [group.width, self.height(kind, len(sockets)) + (MISSING if models else 0)], "flags": {},
            "order": number - 1, "mode": 0,
            "inputs": sockets,
            "outputs": [{"name": str(name or kind), "type": str(kind), "links": []}
                        for name, kind in zip(labels, definition.RETURN_TYPES)],
            "properties": {"Node name for S&R": kind, **({"models": list(models)} if models else {})},
            "widgets_values": widgets, **(CHANGE if change else {})})
        return number

    def height(self, kind: str, sockets: int) -> int:
        """A node's height without its title, as the taller renderer draws it."""
        definition = self.definitions[kind]
        needed = definition.INPUT_TYPES()
        height = 14 + 20 * max(sockets, len(definition.RETURN_TYPES)) + (24 if kind.startswith("Mixology") else 0)
        for name, spec in {**needed.get("required", {}), **needed.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            height += 20 if name in SEEDS else 0  # the classic renderer's own row for what follows a run
            if options.get("multiline"):
                height += 90
            elif isinstance(spec[0], list) or spec[0] in SOCKETS:
                height += 36 if spec[0] == "STRING" else 28
        return height + (PICTURE - 60 if kind in ("LoadImage", "SaveImage", "PreviewImage") else 0)

    def grow(self, name: str, template: dict[str, Any], sources: Sequence[Link], target: int, first: int,
             ) -> list[dict[str, Any]]:
        """The sockets of a growing input: one for each source, wired, and one that waits for the next."""
        kind = next(iter(template["input"]["required"].values()))[0]
        sockets: list[dict[str, Any]] = []
        for index in range(min(len(sources) + 1, template["max"])):
            label = f"{template['prefix']}{index}"
            link = self.connect(sources[index], target, first + index, kind) if index < len(sources) else None
            sockets.append({"name": f"{name}.{label}", "label": label, "type": kind, "link": link,
                            **({} if index < template["min"] else {"shape": 7})})
        return sockets

    def connect(self, source: Link, target: int, socket: int, kind: str) -> int:
        number = len(self.links) + 1
        self.links.append([number, source[0], source[1], target, socket, kind])
        if source[0] > 0:
            self.nodes[source[0] - 1]["outputs"][source[1]]["links"].append(number)
        return number

    def render(self, about: Sequence[str]) -> str:
        """The file's text; `about` are the note's four lines."""
        boxes = self.place()
        note = {"id": len(self.nodes) + 1, "type": "MarkdownNote", "title": "About", "pos": [0, 0], "size": list(NOTE),
                "flags": {}, "order": len(self.nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {},
                "widgets_values": ["\n\n".join(about)], "color": "#432", "bgcolor": "#653"}
        graph = {"last_node_id": len(self.nodes) + 1, "last_link_id": len(self.links), "nodes": [*self.nodes, note],
                 "links": self.links, "groups": boxes, "config": {}, "extra": {}, "version": 0.4}
        return json.dumps(graph, indent=1) + "\n"

    def place(self) -> list[dict[str, Any]]:
        """Gives every node its place; returns the groups' boxes."""
        boxes: list[dict[str, Any]] = []
        left = right = PAD
        bottom = top = NOTE[1] + BETWEEN
        for number, group in enumerate(self.groups, 1):
            if group.below:
                top = bottom + APART
            else:
                left, top = right, NOTE[1] + BETWEEN
            y = top + HEAD + TITLE
            for index in group.nodes:
                node = self.nodes[index - 1]
                node["pos"] = [left, y]
                y += node["size"][1] + (PREVIEW if node["type"] in PREVIEWING else 0) + TITLE + BETWEEN
            bottom = y - BETWEEN - TITLE + PAD
            right = max(right, left + group.width + 2 * PAD + APART)
            boxes.append({"id": number, "title": group.title, "color": "#3f789e", "font_size": 24, "flags": {},
                          "bounding": [left - PAD, top, group.width + 2 * PAD, bottom - top]})
        return boxes


def widget_values(name: str, spec: Sequence[Any], inputs: dict[str, Any]) -> list[Any]:
    """What the widgets of one input save: its value, and what the GUI puts behind it."""
    options = spec[1] if len(spec) > 1 else {}
    fallback = spec[0][0] if isinstance(spec[0], list) and spec[0] else ""
    values = [inputs.get(name, options.get("default", fallback))]
    if name in SEEDS:
        values.append("fixed")
    if options.get("image_upload"):
        values.append("image")
    return values


def load_definitions() -> tuple[dict[str, Any], dict[str, str]]:
    """Every node class of the host and of the pack by id, and their names."""
    import nodes

    async def load() -> None:
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        await nodes.load_custom_node(str(ROOT))

    asyncio.run(load())
    return dict(nodes.NODE_CLASS_MAPPINGS), dict(nodes.NODE_DISPLAY_NAME_MAPPINGS)
