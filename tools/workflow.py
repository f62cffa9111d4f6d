"""Turns a saved workflow (the GUI's format) into a prompt (the API's format), as the GUI does when Run is pressed."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Failure

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3", "COLOR"}
COMMENTS = {"Note", "MarkdownNote"}
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
MUTED, BYPASSED = 2, 4
DEMO_LORA = "mixology-demo-neon.safetensors"
DEMO_MIXER = "mixer"  # the demo checkpoint that attends to pictures
LOADERS = {"CLIPLoader": 1, "CLIPVisionLoader": 3}  # and the output of a demo checkpoint that replaces theirs
Definitions = Mapping[str, Mapping[str, Any]]
Source = tuple[int, int]  # node id, output slot


@dataclass(frozen=True)
class _Value:
    """What a link carries when its source is a PrimitiveNode."""

    value: Any


class Workflow:
    """A prompt that remembers its nodes' titles: nodes are found, set and exchanged by them."""

    def __init__(self, prompt: dict[str, dict[str, Any]], definitions: Definitions) -> None:
        self.prompt = prompt
        self._definitions = definitions

    @classmethod
    def load(cls, path: Path, definitions: Definitions) -> Workflow:
        """Reads a template; `definitions` are the server's /object_info."""
        try:
            graph = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Failure(f"The workflow {path.name} cannot be read ({error}).") from error
        return cls(convert(graph, definitions, path.name), definitions)

    def find(self, title: str) -> str:
        """The id of the one node with this title, with this role at its title's end, or of this class."""
        found = [name for name, node in self.prompt.items()
                 if title in (node["_meta"]["title"], node["class_type"])
                 or node["_meta"]["title"].endswith(f" ({title})")]
        if len(found) != 1:
            raise Failure(f"The workflow should have one node titled {title!r}, it has {len(found)}.")
        return found[0]

    def ids(self, class_type: str) -> list[str]:
        return [name for name, node in self.prompt.items() if node["class_type"] == class_type]

    def set(self, title: str, /, **values: Any) -> None:
        """Sets inputs of the node with this title."""
        self.set_inputs(self.find(title), **values)

    def set_inputs(self, name: str, /, **values: Any) -> None:
        node = self.prompt[name]
        known = dict(_inputs(self._definitions[node["class_type"]]))
        for key in values:
            if key.split(".")[0] not in known:
                raise Failure(f"{node['class_type']} has no input {key!r}, it has: {', '.join(known)}.")
        node["inputs"].update(values)

    def add(self, class_type: str, /, **values: Any) -> str:
        """Puts in another node; returns its id."""
        name = str(1 + max(int(name) for name in self.prompt))
        definition = self._definition(class_type)
        self.prompt[name] = {"class_type": class_type, "inputs": defaults(definition), "_meta": {"title": f"+{name}"}}
        self.set_inputs(name, **values)
        return name

    def exchange(self, class_type: str, replacement: str, /, **values: Any) -> None:
        """Puts another node class where `class_type` stands; what hangs on its outputs keeps their numbers."""
        for name in self.ids(class_type):
            self.prompt[name] = {"class_type": replacement, "inputs": defaults(self._definition(replacement)),
                                 "_meta": self.prompt[name]["_meta"]}
            self.set_inputs(name, **values)

    def replace_links(self, name: str, source: list[Any]) -> None:
        """Lets what hangs on the first output of a node hang on another one."""
        for node in self.prompt.values():
            for key, value in node["inputs"].items():
                if value == [name, 0]:
                    node["inputs"][key] = list(source)

    def fit_pictures(self, side: int) -> None:
        """Makes the template's pictures `side` pixels wide and high."""
        for name in self.ids("EmptyLatentImage"):
            self.set_inputs(name, width=side, height=side)
        for name in self.ids("ImageScaleToTotalPixels"):
            self.set_inputs(name, megapixels=side * side / 1024**2)

    def use_demo_checkpoint(self) -> None:
        """Demo checkpoints for the template's own, another one for each loader, and the demo LoRA for its LoRA."""
        self.exchange("CheckpointLoaderSimple", "MixologyDemoCheckpoint")
        names = _choices(dict(_inputs(self._definition("MixologyDemoCheckpoint")))["name"])
        if self.ids("MixologyMixerConditioning"):
            names = [DEMO_MIXER]
        for loader, name in zip(self.ids("MixologyDemoCheckpoint"), names):
            self.set_inputs(loader, name=name)
        for kind, output in LOADERS.items():
            for loader in self.ids(kind):
                self.replace_links(loader, [self.ids("MixologyDemoCheckpoint")[0], output])
                del self.prompt[loader]
        for loader in self.ids("LoraLoader"):
            self.set_inputs(loader, lora_name=DEMO_LORA)

    def use_demo_picture(self, **values: Any) -> None:
        self.exchange("LoadImage", "MixologyDemoPicture", **values)

    def _definition(self, class_type: str) -> Mapping[str, Any]:
        if class_type not in self._definitions:
            raise Failure(f"The server has no node {class_type}.")
        return self._definitions[class_type]


def defaults(definition: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh node's widgets show."""
    found: dict[str, Any] = {}
    for name, spec in _inputs(definition):
        if _is_widget(spec) and name in definition["input"].get("required", {}):
            choices = _choices(spec)
            first = choices[0]["key"] if choices and isinstance(choices[0], dict) else next(iter(choices), "")
            found[name] = _options(spec).get("default", first)
    return found


def _choices(spec: Any) -> list[Any]:
    """What a combo offers."""
    return spec[0] if isinstance(spec[0], list) else _options(spec).get("options", [])


def convert(graph: Mapping[str, Any], definitions: Definitions, name: str = "workflow") -> dict[str, dict[str, Any]]:
    """The API format of a GUI-format graph."""
    if "nodes" not in graph:
        raise Failure(f"{name} is not a saved workflow (it has no list of nodes).")
    nodes = {int(node["id"]): node for node in graph["nodes"]}
    links: dict[int, Source] = {}
    for link in graph.get("links", ()):
        if isinstance(link, Mapping):
            links[link["id"]] = (int(link["origin_id"]), int(link["origin_slot"]))
        else:
            links[link[0]] = (int(link[1]), int(link[2]))
    prompt: dict[str, dict[str, Any]] = {}
    for number, node in nodes.items():
        kind = node["type"]
        if kind in COMMENTS or kind in ("Reroute", "PrimitiveNode") or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if kind not in definitions:
            raise Failure(f"{name} uses the node {kind}, which this server does not have.")
        inputs = _widget_values(node, definitions[kind], name)
        for socket in node.get("inputs") or ():
            source = _trace(socket.get("link"), nodes, links)
            if isinstance(source, _Value):
                inputs[socket["name"]] = source.value
            elif source is not None:
                inputs[socket["name"]] = [str(source[0]), source[1]]
        title = node.get("title") or definitions[kind].get("display_name") or kind
        prompt[str(number)] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _trace(link: int | None, nodes: Mapping[int, Any], links: Mapping[int, Source]) -> Source | _Value | None:
    """The output behind a link: through reroutes and bypassed nodes; None if nothing real is there."""
    while link is not None and link in links:
        number, slot = links[link]
        node = nodes.get(number)
        if node is None or node.get("mode", 0) == MUTED:
            return None
        if node["type"] == "PrimitiveNode":
            return _Value(node["widgets_values"][0])
        if node["type"] == "Reroute":
            link = node["inputs"][0].get("link")
        elif node.get("mode", 0) == BYPASSED:
            link = _bypass(node, slot)
        else:
            return number, slot
    return None


def _bypass(node: Mapping[str, Any], slot: int) -> int | None:
    """The link that a bypassed node passes on: its input of the output's type, the same slot first."""
    inputs = node.get("inputs") or []
    wanted = node["outputs"][slot]["type"]
    same_slot = inputs[slot:slot + 1]
    for socket in [*same_slot, *inputs]:
        if socket["type"] == wanted and socket.get("link") is not None:
            return int(socket["link"])
    return None


def _widget_values(node: Mapping[str, Any], definition: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Pairs the saved widget values, a plain list, with the inputs that show as widgets."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, Mapping):
        known = {key for key, spec in _inputs(definition) if _is_widget(spec)}
        return {key: value for key, value in saved.items() if key in known}
    values: dict[str, Any] = {}
    rest = list(saved)
    _take(_inputs(definition), rest, values, "")
    missing = [key for key, spec in definition["input"].get("required", {}).items()
               if _is_widget(spec) and key not in values]
    if missing:
        raise Failure(f"{name} saves no value for {', '.join(missing)} of {node['type']}: save it again in the GUI.")
    return values


def _take(inputs: Iterable[tuple[str, Any]], rest: list[Any], values: dict[str, Any], prefix: str) -> None:
    for key, spec in inputs:
        if not _is_widget(spec) or not rest:
            continue
        value = values[prefix + key] = rest.pop(0)
        if rest and _has_control(key, spec) and rest[0] in AFTER_GENERATE:
            rest.pop(0)  # the GUI's own "control after generate" widget
        if spec[0] == "COMFY_DYNAMICCOMBO_V3":
            for option in _options(spec).get("options", ()):
                if option["key"] == value:
                    _take(_flat(option["inputs"]), rest, values, f"{prefix}{key}.")


def _has_control(key: str, spec: Any) -> bool:
    return bool(_options(spec).get("control_after_generate")) or key in ("seed", "noise_seed")


def _inputs(definition: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All inputs in the order in which the GUI makes their widgets."""
    order = definition.get("input_order") or {}
    flat = dict(_flat(definition["input"]))
    groups = (order.get(group, definition["input"].get(group, {})) for group in ("required", "optional"))
    return [(name, flat[name]) for group in groups for name in group]


def _flat(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    return [(name, spec) for group in ("required", "optional") for name, spec in groups.get(group, {}).items()]


def _options(spec: Any) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}


def _is_widget(spec: Any) -> bool:
    if _options(spec).get("forceInput"):
        return False
    return isinstance(spec[0], list) or spec[0] in WIDGETS or _options(spec).get("widgetType") in WIDGETS
