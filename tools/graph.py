"""A workflow under construction, in the GUI's own format.

Node definitions come from the host, so widget order is never typed here.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOCKETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}  # these show as widgets
GROWING = "COMFY_AUTOGROW_V3"  # shows as many sockets as are wired, and one more
Link = tuple[int, int]  # node id, output slot


@dataclass
class Graph:
    """A workflow under construction."""

    definitions: dict[str, Any]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)

    def add(self, kind: str, title: str, at: tuple[int, int], size: tuple[int, int], /, **inputs: Any) -> int:
        """One node; an input that is a `Link` is wired, a growing one takes several, any other is a widget's value."""
        definition = self.definitions[kind]
        number = len(self.nodes) + 1
        sockets: list[dict[str, Any]] = []
        widgets: list[Any] = []
        groups = definition.INPUT_TYPES()
        for name, spec in {**groups.get("required", {}), **groups.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list) or spec[0] in SOCKETS:
                fallback = spec[0][0] if isinstance(spec[0], list) and spec[0] else ""
                widgets.append(inputs.get(name, options.get("default", fallback)))
                if name in ("seed", "noise_seed"):
                    widgets.append("fixed")
                if options.get("image_upload"):
                    widgets.append("image")
                continue
            if spec[0] == GROWING:
                sockets += self.grow(name, options["template"], inputs[name], number, len(sockets))
                continue
            link = None
            if isinstance(inputs.get(name), tuple):
                link = self.connect(inputs[name], number, len(sockets), spec[0])
            sockets.append({"name": name, "type": spec[0], "link": link, **({"shape": 7} if name in groups.get(
                "optional", {}) else {})})
        names = getattr(definition, "RETURN_NAMES", None) or definition.RETURN_TYPES
        self.nodes.append({
            "id": number, "type": kind, "title": title, "pos": list(at), "size": list(size), "flags": {},
            "order": number - 1, "mode": 0, "inputs": sockets,
            "outputs": [{"name": str(name or kind), "type": str(kind), "links": []}
                        for name, kind in zip(names, definition.RETURN_TYPES)],
            "properties": {"Node name for S&R": kind}, "widgets_values": widgets})
        return number

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
        self.nodes[source[0] - 1]["outputs"][source[1]]["links"].append(number)
        return number

    def note(self, text: str, at: tuple[int, int], size: tuple[int, int]) -> None:
        self.nodes.append({
            "id": len(self.nodes) + 1, "type": "MarkdownNote", "title": "About", "pos": list(at), "size": list(size),
            "flags": {}, "order": len(self.nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [text], "color": "#432", "bgcolor": "#653"})

    def render(self) -> str:
        """The file's text."""
        graph = {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
                 "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}
        return json.dumps(graph, indent=1) + "\n"


def load_definitions() -> dict[str, Any]:
    """Every node class of the host and of the pack, by id."""
    import nodes

    async def load() -> None:
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        await nodes.load_custom_node(str(ROOT))

    asyncio.run(load())
    return dict(nodes.NODE_CLASS_MAPPINGS)
