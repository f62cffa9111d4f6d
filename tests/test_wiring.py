"""Every input of every node arrives where it acts: a sentinel through each, so that no two can be exchanged and none
is dropped."""
from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from comfy_api.latest import io
from mixology import nodes as room
from mixology.nodes import (
    attention_merge,
    cycle,
    demo,
    fusion,
    injection,
    inversion,
    layout,
    metrics,
    mixer,
    spatial,
    sweep,
    token_scale,
)

WHERE = {  # a node's id, the module or object and the name in it that its execute asks
    "MixologyLayoutNoise": (layout.magicmix, "make_layout"),
    "MixologyLayoutFromPrompt": (layout.magicmix, "record_layout"),
    "MixologyLayoutMixSampler": (layout.magicmix, "LayoutMixSampler"),
    "MixologyLayoutMixKSampler": (layout.magicmix, "mix_latent"),
    "MixologyTokenScale": (token_scale, "scale_tokens"),
    "MixologyAttentionMerge": (attention_merge, "merge_conditionings"),
    "MixologyGradientMask": (spatial, "draw_gradient_masks"),
    "MixologyEpsilonMergeGuider": (spatial.spatial, "EpsilonMergeGuider"),
    "MixologyCycleSampler": (cycle.cycle, "CycleSampler"),
    "MixologyBlendPrompts": (inversion.inversion, "blend_prompts"),
    "MixologyInvert": (inversion.inversion, "invert_latent"),
    "MixologyFeatureInjection": (injection, "inject_features"),
    "MixologyTrajectoryStart": (inversion, "start_trajectory"),
    "MixologyCocktailKSampler": (injection, "sample_cocktail"),
    "MixologySaveTrajectory": (inversion.trajectory_file, "save_trajectory"),
    "MixologyLoadTrajectory": (inversion.trajectory_file, "load_trajectory"),
    "MixologyExpert": (fusion.chain, "add_expert"),
    "MixologySaliencyGuider": (fusion.fusion, "SaliencyGuider"),
    "MixologySaliencyMaps": (fusion.fusion, "show_maps"),
    "MixologyMixerImage": (mixer.image_mixer, "mix_image"),
    "MixologyMixerText": (mixer.image_mixer, "mix_text"),
    "MixologyMixerConditioning": (mixer.image_mixer, "make_conditioning"),
    "MixologyImageMetrics": (metrics.metrics, "measure_pictures"),
    "MixologyClipMetrics": (metrics.metrics_clip, "measure_clip"),
    "MixologySweep": (sweep, "make_sweep"),
    "MixologyLabelledGrid": (sweep, "label_grid"),
    "MixologyDemoCheckpoint": (demo, "load_checkpoint"),
    "MixologyDemoPicture": (demo, "draw_picture"),
}
MANY = {"MixologyLayoutFromPrompt", "MixologyTokenScale", "MixologyAttentionMerge", "MixologyTrajectoryStart",
        "MixologySaliencyMaps", "MixologyMixerConditioning", "MixologyDemoPicture", "MixologyDemoCheckpoint",
        "MixologyImageMetrics", "MixologyClipMetrics", "MixologySweep"}
SHOWN = (  # what a node shows of its outputs, which is none of its outputs
    (fusion, "draw_strip"), (spatial, "draw_mask_sheet"), (inversion.trajectory_file, "describe_saved"),
    (inversion.trajectory_file, "describe_length"), (inversion, "show_text"), (fusion.ui, "PreviewImage"),
    (sweep.ui, "PreviewImage"), (metrics.ui, "PreviewText"))
BOX = ("x", "y", "width", "height")  # of Mixer Image, in one argument


class Sentinel:
    """What comes through a socket."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def make_sentinel(socket: Any, place: int, count: int) -> Any:
    """A value that the input takes, and no other input of its node has."""
    kind = socket.get_io_type()
    if kind in ("INT", "FLOAT"):
        low = socket.min
        high = min(socket.max, low + 150)
        value = low + (high - low) * (place + 1) / (count + 1)
        return round(value) if kind == "INT" else value
    if kind == "BOOLEAN":
        return not socket.default
    if kind == "COMBO":
        return socket.options[-1] if socket.options else "a file"
    if kind == "STRING":
        return f"words for {socket.id}"
    return Sentinel(socket.id)


def flatten(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; those of a dataclass, such as a schedule, in its place."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "box":
            found |= dict(zip(BOX, value))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        else:
            found[name] = value
    return found


def schema_of(node: Any) -> io.Schema:
    return node.define_schema()


def test_every_node_is_here(pack: dict[str, Any]) -> None:
    assert set(WHERE) == set(pack)


@pytest.mark.parametrize("name", WHERE)
def test_every_input_arrives_under_its_name(name: str, pack: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    node, (place, asked) = pack[name], WHERE[name]
    sockets = schema_of(node).inputs
    given = {socket.id: make_sentinel(socket, i, len(sockets)) for i, socket in enumerate(sockets)}
    many = schema_of(node).is_input_list
    numbers = [value for value in given.values() if isinstance(value, int | float) and not isinstance(value, bool)]
    assert len(numbers) == len(set(numbers)), f"two inputs of {name} have the same sentinel: {given}"
    given = {name: [value] for name, value in given.items()} if many else given
    outputs = tuple(Sentinel(f"output {i}") for i in range(len(schema_of(node).outputs)))
    answer = outputs if name in MANY else (outputs or ("saved",))[0]
    if name == "MixologyDemoCheckpoint":
        answer = outputs[:3]
        monkeypatch.setattr(demo, "load_clip_vision", lambda: outputs[3])
    if name in ("MixologyInvert", "MixologyLoadTrajectory"):
        monkeypatch.setattr(inversion, "end_latent", lambda trajectory: {outputs[0]: outputs[1]}[trajectory])
    for shower, shown in SHOWN:
        monkeypatch.setattr(shower, shown, lambda *parts, **named: {"shown": [*parts, *named]})
    signature, found = inspect.signature(getattr(place, asked)), {}

    def record(*args: Any, **kwargs: Any) -> Any:
        found.update(flatten(dict(signature.bind(*args, **kwargs).arguments)))
        return answer

    monkeypatch.setattr(place, asked, record)
    result = node.execute(**given)
    assert found == given, f"{name} hands its inputs on otherwise"
    assert tuple(result.args) == outputs if outputs else result.ui is not None


def test_the_entry_point_offers_every_class() -> None:
    """None of a technique's nodes is left out of the list."""
    classes = {value for module in (attention_merge, cycle, demo, fusion, injection, inversion, layout, metrics, mixer,
                                    spatial, sweep, token_scale)
               for value in vars(module).values() if isinstance(value, type) and issubclass(value, io.ComfyNode)}
    offered = {value for value in vars(room).values() if isinstance(value, type) and issubclass(value, io.ComfyNode)}
    assert classes - {io.ComfyNode} == offered - {io.ComfyNode}
