"""What nodes show, as the interface gets it from the real server: pictures, texts, and the list of trajectories."""
from __future__ import annotations

import re
from typing import Any

import pytest
from commands import Failure

pytestmark = [pytest.mark.server, pytest.mark.seam, pytest.mark.wide]

SECONDS = 120.0
TEXT_MESSAGE = 3  # the host's number of messages that show a text on a node
NO_FILE = "no trajectory yet: run Save Trajectory, then press R"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def expert(**inputs: Any) -> dict[str, Any]:
    return node("MixologyExpert", **{"model": ["demo", 0], "positive": ["prompt", 0], "negative": ["empty", 0],
                                     "cfg": 3.0, "temperature": 1.0, **inputs})


PICTURE = {"picture": node("MixologyDemoPicture", caption="a red star", seed=1, width=64, height=64)}
DEMO = {"demo": node("MixologyDemoCheckpoint", name="shapes"),
        "prompt": node("CLIPTextEncode", text="a red star", clip=["demo", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["demo", 1])}
INVERTED = {**PICTURE, **DEMO, "latent": node("VAEEncode", pixels=["picture", 0], vae=["demo", 2]),
            "inverted": node("MixologyInvert", model=["demo", 0], conditioning=["empty", 0], latent=["latent", 0],
                             steps=2, scheduler="ddim_uniform", rule="ditail")}
FUSED = {**DEMO, "first": expert(), "second": expert(positive=["empty", 0], experts=["first", 0]),
         "guider": node("MixologySaliencyGuider", experts=["second", 0], blur=4.0, softness=0.0, start_percent=0.0,
                        end_percent=1.0, outside=0, saliency_uncond="own"),
         "sigmas": node("BasicScheduler", model=["demo", 0], scheduler="normal", steps=3, denoise=1.0),
         "solver": node("KSamplerSelect", sampler_name="euler"), "noise": node("RandomNoise", noise_seed=1),
         "size": node("EmptyLatentImage", width=64, height=64, batch_size=2),
         "sampled": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["solver", 0],
                         sigmas=["sigmas", 0], latent_image=["size", 0])}


def run(server: Any, graph: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Runs a graph; returns the run, and the texts by the node that shows them."""
    shown: dict[str, str] = {}

    def listen(event: Any) -> None:
        if event.kind == "preview" and int.from_bytes(event.data[:4], "big") == TEXT_MESSAGE:
            length = int.from_bytes(event.data[4:8], "big")
            shown[event.data[8:8 + length].decode()] = event.data[8 + length:].decode()

    return server.post(graph, listen, seconds=SECONDS), shown


def names(server: Any) -> list[str]:
    """The list of Load Trajectory as R refreshes it."""
    return server.get_json("/object_info/MixologyLoadTrajectory")["MixologyLoadTrajectory"]["input"]["required"][
        "name"][1]["options"]


def test_pictures_are_shown_by_nodes_that_nothing_hangs_on(server: Any) -> None:
    """One each: of a picture, of all masks, of all steps of a fusion."""
    masks = node("MixologyGradientMask", width=64, height=64, profile="linear", parts=4, angle=0.0, sharpness=20.0,
                 rows=1)
    over = {"decoded": node("VAEDecode", samples=["sampled", 0], vae=["demo", 2]),
            "maps": node("MixologySaliencyMaps", guider=["guider", 0], latent=["sampled", 0], image=["decoded", 0])}
    done, _ = run(server, {**PICTURE, "masks": masks, **FUSED, **over})
    assert {place: len(pictures) for place, pictures in done.images.items()} == {"picture": 1, "masks": 1, "maps": 1}
    assert all(file["type"] == "temp" for output in done.outputs.values() for file in output["images"])


def test_a_saved_trajectory_is_named_and_listed(server: Any) -> None:
    before = names(server)
    done, shown = run(server, {**INVERTED, "saved": node(
        "MixologySaveTrajectory", trajectory=["inverted", 0], filename_prefix="shown/star")})
    name, length = shown["saved"].splitlines()
    assert re.fullmatch(r"shown/star_\d{5}_\.safetensors \[output\]", name) and length == "2 steps, 1 picture"
    assert done.outputs["saved"]["text"] == [shown["saved"]]
    assert name not in before and {*before} - {NO_FILE} == {*names(server)} - {name}
    assert NO_FILE not in names(server)
    _, shown = run(server, {"loaded": node("MixologyLoadTrajectory", name=name),
                            "end": node("PreviewAny", source=["loaded", 0])})
    assert shown["loaded"] == "2 steps, 1 picture"


def test_what_to_do_where_there_is_no_trajectory(server: Any) -> None:
    with pytest.raises(Failure, match="Load Trajectory expects a saved trajectory, got none; run a workflow with Save "
                                      "Trajectory, press R to refresh this node's list, and choose the file there"):
        run(server, {"loaded": node("MixologyLoadTrajectory", name=NO_FILE),
                     "end": node("PreviewAny", source=["loaded", 0])})
