"""The subgraph blueprints of `subgraphs/`: each technique as one node with the inputs that matter."""
from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graph import Graph, Link
from worlds import Model, sample, sample_custom, say_text

FOLDER = Path(__file__).resolve().parent.parent / "subgraphs"
SPACE = uuid.UUID("6d69786f-6c6f-4779-8000-000000000000")
INSIDE, OUTSIDE = -10, -20  # the host's numbers for a subgraph's own inputs and outputs
Socket = tuple[str, str] | tuple[str, str, Any]  # name and type of an input, and what its widget shows
MODEL: tuple[Socket, ...] = (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"))


def own(sockets: Sequence[Socket], name: str) -> Link:
    """What comes in at the subgraph's input of this name."""
    return INSIDE, [socket[0] for socket in sockets].index(name)


def loaded(sockets: Sequence[Socket], model: str = "model") -> Model:
    return Model(INSIDE, own(sockets, model), own(sockets, "clip"), own(sockets, "vae"))


def decode(graph: Graph, latent: Link, vae: Link) -> Link:
    with graph.group("Picture"):
        return graph.add("VAEDecode", samples=latent, vae=vae), 0


LAYOUT: tuple[Socket, ...] = (*MODEL, ("image", "IMAGE"), ("prompt", "STRING", "a photo of a corgi"),
                              ("nu", "FLOAT", 0.5), ("seed", "INT", 0))
COCKTAIL: tuple[Socket, ...] = (*MODEL, ("target_model", "MODEL"), ("image", "IMAGE"),
                                ("what_it_shows", "STRING", ""), ("what_it_becomes", "STRING", ""),
                                ("attention_until", "FLOAT", 0.5), ("features_until", "FLOAT", 0.8))
STYLES: tuple[Socket, ...] = (*MODEL, ("latent_image", "LATENT"), ("left", "STRING", ""), ("right", "STRING", ""),
                              ("angle", "FLOAT", 0.0), ("cfg", "FLOAT", 7.5), ("seed", "INT", 0))
FUSION: tuple[Socket, ...] = (*MODEL, ("expert_model", "MODEL"), ("latent_image", "LATENT"), ("prompt", "STRING", ""),
                              ("expert_prompt", "STRING", ""), ("softness", "FLOAT", 0.0), ("seed", "INT", 0))
MIXER: tuple[Socket, ...] = (("model", "MODEL"), ("vae", "VAE"), ("clip_vision", "CLIP_VISION"),
                             ("latent_image", "LATENT"), ("first", "IMAGE"), ("second", "IMAGE"),
                             ("strength_of_second", "FLOAT", 1.0), ("mode", "COMBO", "concat"), ("seed", "INT", 0))


def mix_layout(graph: Graph) -> Link:
    model = loaded(LAYOUT)
    with graph.group("The picture becomes a layout"):
        latent = graph.add("VAEEncode", pixels=own(LAYOUT, "image"), vae=model.vae)
        layout = graph.add("MixologyLayoutNoise", latent=(latent, 0), seed=own(LAYOUT, "seed"))
    with graph.group("Prompts"):
        content = graph.add("CLIPTextEncode", clip=model.clip, text=own(LAYOUT, "prompt"))
        negative = say_text(graph, "", model, "")
    with graph.group("Mix"):
        mix = graph.add("MixologyLayoutMixKSampler", model=model.model, positive=(content, 0), negative=negative,
                        layout=(layout, 0), seed=own(LAYOUT, "seed"), nu=own(LAYOUT, "nu"))
    return decode(graph, (mix, 0), model.vae)


def mix_cocktail(graph: Graph) -> Link:
    model = loaded(COCKTAIL)
    with graph.group("Back to noise"):
        latent = graph.add("VAEEncode", pixels=own(COCKTAIL, "image"), vae=model.vae)
        shown = graph.add("CLIPTextEncode", clip=model.clip, text=own(COCKTAIL, "what_it_shows"))
        way = graph.add("MixologyInvert", model=model.model, conditioning=(shown, 0), latent=(latent, 0))
    with graph.group("Repaint"):
        empty = say_text(graph, "", model, "")
        positive = graph.add("CLIPTextEncode", clip=model.clip, text=own(COCKTAIL, "what_it_becomes"))
        mix = graph.add("MixologyCocktailKSampler", model=own(COCKTAIL, "target_model"), trajectory=(way, 0),
                        source_conditioning=empty, positive=(positive, 0), negative=empty,
                        attention_until=own(COCKTAIL, "attention_until"),
                        features_until=own(COCKTAIL, "features_until"))
    return decode(graph, (mix, 0), model.vae)


def wire_seed(graph: Graph, seed: Link) -> None:
    """Gives the noise of custom sampling the subgraph's seed."""
    node = next(node for node in graph.nodes if node["type"] == "RandomNoise")
    node["inputs"].append({"name": "noise_seed", "type": "INT", "widget": {"name": "noise_seed"},
                           "link": graph.connect(seed, node["id"], 0, "INT")})


def mix_styles(graph: Graph) -> Link:
    model = loaded(STYLES)
    with graph.group("Who paints where"):
        masks = graph.add("MixologyGradientMask", profile="logistic", angle=own(STYLES, "angle"))
    with graph.group("Styles"):
        sides = [(graph.add("CLIPTextEncode", clip=model.clip, text=own(STYLES, side)), 0)
                 for side in ("left", "right")]
        negative = say_text(graph, "", model, "")
        guider = graph.add("MixologyEpsilonMergeGuider", model=model.model, masks=(masks, 0), positives=sides,
                           negative=negative, cfg=own(STYLES, "cfg"))
    with graph.group("Sample"):
        sampled = sample_custom(graph, model, (guider, 0), own(STYLES, "latent_image"))
    wire_seed(graph, own(STYLES, "seed"))
    return decode(graph, sampled, model.vae)


def fuse(graph: Graph) -> Link:
    model = loaded(FUSION)
    before: dict[str, Any] = {}
    with graph.group("Experts"):
        negative = say_text(graph, "", model, "")
        for weights, text in (("model", "prompt"), ("expert_model", "expert_prompt")):
            positive = graph.add("CLIPTextEncode", clip=model.clip, text=own(FUSION, text))
            before = {"experts": (graph.add("MixologyExpert", model=own(FUSION, weights), positive=(positive, 0),
                                            negative=negative, **before), 0)}
        guider = graph.add("MixologySaliencyGuider", softness=own(FUSION, "softness"), **before)
    with graph.group("Sample"):
        sampled = sample_custom(graph, model, (guider, 0), own(FUSION, "latent_image"))
    wire_seed(graph, own(FUSION, "seed"))
    return decode(graph, sampled, model.vae)


def mix_pictures(graph: Graph) -> Link:
    with graph.group("Pictures"):
        first = graph.add("MixologyMixerImage", clip_vision=own(MIXER, "clip_vision"), image=own(MIXER, "first"))
        second = graph.add("MixologyMixerImage", clip_vision=own(MIXER, "clip_vision"), image=own(MIXER, "second"),
                           strength=own(MIXER, "strength_of_second"), mixer=(first, 0))
        mix = graph.add("MixologyMixerConditioning", mixer=(second, 0), mode=own(MIXER, "mode"),
                        model=own(MIXER, "model"))
    with graph.group("Sample"):
        sampled = sample(graph, own(MIXER, "model"), (mix, 0), (mix, 1), own(MIXER, "latent_image"), 30, 3.0,
                         seed=own(MIXER, "seed"))
    return decode(graph, sampled, own(MIXER, "vae"))


BLUEPRINTS: dict[str, tuple[Sequence[Socket], Callable[[Graph], Link], str]] = {
    "Layout Mix (MagicMix)": (LAYOUT, mix_layout, "The layout of a picture, the content of a prompt."),
    "Cocktail (Ditail)": (COCKTAIL, mix_cocktail, "A picture followed back to noise with one model and painted anew by "
                          "another."),
    "Dual Style": (STYLES, mix_styles, "Two prompts share one picture, left and right."),
    "Fusion (MagicFusion)": (FUSION, fuse, "Two models, each where it knows best."),
    "Image Mixer": (MIXER, mix_pictures, "Two pictures become one, on a model trained on image embeddings."),
}


def render(name: str, definitions: dict[str, Any], names: dict[str, str]) -> str:
    """A blueprint's file: one node, and the subgraph behind it."""
    sockets, build, description = BLUEPRINTS[name]
    graph = Graph(definitions, names)
    result = build(graph)
    final = graph.connect(result, OUTSIDE, 0, "IMAGE")
    boxes = graph.place()
    right = max(node["pos"][0] + node["size"][0] for node in graph.nodes) + 100
    used = {slot: [link[0] for link in graph.links if link[1] == INSIDE and link[2] == slot]
            for slot in range(len(sockets))}
    inner = {
        "id": str(uuid.uuid5(SPACE, name)), "version": 1, "revision": 0, "config": {}, "name": name,
        "state": {"lastGroupId": len(boxes), "lastNodeId": len(graph.nodes), "lastLinkId": len(graph.links),
                  "lastRerouteId": 0},
        "inputNode": {"id": INSIDE, "bounding": [-260, 240, 160, 40 + 20 * len(sockets)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right, 240, 120, 60]},
        "inputs": [{"id": str(uuid.uuid5(SPACE, f"{name} {socket[0]}")), "name": socket[0], "type": socket[1],
                    "linkIds": used[slot], "label": socket[0].replace("_", " "), "pos": [-120, 260 + 20 * slot]}
                   for slot, socket in enumerate(sockets)],
        "outputs": [{"id": str(uuid.uuid5(SPACE, f"{name} out")), "name": "IMAGE", "type": "IMAGE",
                     "linkIds": [final], "pos": [right + 20, 260]}],
        "widgets": [], "nodes": graph.nodes, "groups": boxes, "extra": {}, "category": "mixology",
        "description": description,
        "links": [{"id": link[0], "origin_id": link[1], "origin_slot": link[2], "target_id": link[3],
                   "target_slot": link[4], "type": link[5]} for link in graph.links]}
    outer = {
        "id": 1, "type": inner["id"], "pos": [0, 0], "size": [320, 80 + 30 * len(sockets)], "flags": {}, "order": 0,
        "mode": 0, "title": name,
        "inputs": [{"name": socket[0], "label": socket[0].replace("_", " "), "type": socket[1], "link": None,
                    **({"widget": {"name": socket[0]}} if len(socket) > 2 else {})} for socket in sockets],
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": None}],
        "properties": {"proxyWidgets": [["-1", socket[0]] for socket in sockets if len(socket) > 2]},
        "widgets_values": [socket[2] for socket in sockets if len(socket) > 2]}
    return json.dumps({"revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [outer], "links": [], "groups": [],
                       "definitions": {"subgraphs": [inner]}, "config": {}, "extra": {}, "version": 0.4},
                      indent=1) + "\n"
