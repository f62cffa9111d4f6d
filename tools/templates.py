"""Writes the templates of `workflows/`: run it in the tests' environment after a node's inputs changed.

    MIXOLOGY_HOST=... python tools/templates.py

A template is a graph in the GUI's own format. Node definitions come from the host, so widget order is never typed here.
"""
from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOCKETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}  # these show as widgets
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
Link = tuple[int, int]  # node id, output slot


@dataclass
class Graph:
    """A workflow under construction."""

    definitions: dict[str, Any]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)

    def add(self, kind: str, title: str, at: tuple[int, int], size: tuple[int, int], /, **inputs: Any) -> int:
        """One node; an input that is a `Link` is wired, any other is its widget's value."""
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

    def write(self, name: str) -> None:
        graph = {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
                 "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")


def image_text(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    picture = graph.add("LoadImage", "Layout picture", (0, 150), (320, 320), image="example.png")
    fit = graph.add("ImageScaleToTotalPixels", "Fit size", (0, 520), (320, 110), image=(picture, 0),
                    upscale_method="area", megapixels=0.25, resolution_steps=8)
    encode = graph.add("VAEEncode", "VAE Encode", (380, 520), (220, 50), pixels=(fit, 0), vae=(checkpoint, 2))
    layout = graph.add("MixologyLayoutNoise", "Layout Noise", (380, 620), (300, 110), latent=(encode, 0))
    content = graph.add("CLIPTextEncode", "Content prompt", (380, 0), (400, 160), clip=(checkpoint, 1),
                        text="a photo of a corgi sitting in the grass")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 210), (400, 120), clip=(checkpoint, 1),
                         text="blurry, low quality")
    mix = graph.add("MixologyLayoutMixKSampler", "Layout Mix", (840, 0), (340, 420), model=(checkpoint, 0),
                    positive=(content, 0), negative=(negative, 0), layout=(layout, 0))
    decode = graph.add("VAEDecode", "VAE Decode", (1240, 0), (220, 50), samples=(mix, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1240, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/layout_mix")
    graph.note(
        "**MagicMix: the layout of a picture, the content of a prompt.**\n\n"
        "1. Choose a checkpoint and a layout picture, and say what it should become.\n"
        "2. **nu** decides: 0 keeps the picture, 1 is plain image to image. Alike things mix at 0.1 to 0.4, unlike "
        "ones at 0.5 to 0.9.\n"
        "3. A whole sweep in one run: write `0.1, 0.3, 0.5, 0.7, 0.9` into **nu_per_image**.\n\n"
        "SDXL: set Fit size to 1 megapixel.", (840, 480), (340, 260))
    return graph


def text_text(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512)
    layout_prompt = graph.add("CLIPTextEncode", "Layout prompt", (380, 0), (400, 120), clip=(checkpoint, 1),
                              text="a photo of a coffee machine on a table")
    content = graph.add("CLIPTextEncode", "Content prompt", (380, 170), (400, 120), clip=(checkpoint, 1),
                        text="a photo of a corgi")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 340), (400, 120), clip=(checkpoint, 1),
                         text="blurry, low quality")
    layout = graph.add("MixologyLayoutFromPrompt", "Layout from prompt", (840, 0), (320, 320), model=(checkpoint, 0),
                       positive=(layout_prompt, 0), negative=(negative, 0), latent=(size, 0), finish=True)
    mix = graph.add("MixologyLayoutMixKSampler", "Layout Mix", (1220, 0), (340, 420), model=(checkpoint, 0),
                    positive=(content, 0), negative=(negative, 0), layout=(layout, 0), nu=0.7)
    seen = graph.add("VAEDecode", "Decode layout", (840, 380), (220, 50), samples=(layout, 1), vae=(checkpoint, 2))
    graph.add("PreviewImage", "Layout", (840, 490), (320, 300), images=(seen, 0))
    decode = graph.add("VAEDecode", "VAE Decode", (1620, 0), (220, 50), samples=(mix, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1620, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/layout_mix")
    graph.note(
        "**MagicMix: the layout of one prompt, the content of another.**\n\n"
        "The layout prompt is sampled first and its states are recorded; the content prompt is then held to them. "
        "Keep **steps** and **scheduler** the same in both nodes.\n\n"
        "The layout's look depends on its seed: try some until you like it, then sweep **nu_per_image**. Switch "
        "**finish** off once you do not need to see the layout: it saves steps.\n\n"
        "SDXL: set Picture size to 1024 x 1024.", (0, 320), (320, 300))
    return graph


TEMPLATES = {"magicmix_image_text": image_text, "magicmix_text_text": text_text}


def load_definitions() -> dict[str, Any]:
    """Every node class of the host and of the pack, by id."""
    import nodes

    async def load() -> None:
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        await nodes.load_custom_node(str(ROOT))

    asyncio.run(load())
    return dict(nodes.NODE_CLASS_MAPPINGS)


def main() -> None:
    import os

    sys.path.insert(0, os.environ["MIXOLOGY_HOST"])
    from comfy.cli_args import args

    args.cpu = True
    definitions = load_definitions()
    for name, build in TEMPLATES.items():
        build(definitions).write(name)


if __name__ == "__main__":
    main()
