"""Sweep in the real server: onto number, whole number and list widgets of the host's nodes, in products, and cached."""
from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
from comfyui import Run
from PIL import Image

pytestmark = [pytest.mark.server, pytest.mark.wide]

CAPTION = "a striped red star on a blue background"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def make_prompt(sweep: dict[str, Any], **wired: Any) -> dict[str, Any]:
    """Text to picture on the demo checkpoint in 3 steps; `wired` are the sampler's inputs from the sweep."""
    sampler = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "model": node("MixologyDemoCheckpoint", name="shapes"),
        "text": node("CLIPTextEncode", clip=["model", 1], text=CAPTION),
        "none": node("CLIPTextEncode", clip=["model", 1], text=""),
        "size": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sweep": sweep,
        "sampled": node("KSampler", model=["model", 0], positive=["text", 0], negative=["none", 0],
                        latent_image=["size", 0], **{**sampler, **wired}),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["model", 2]),
        "saved": node("SaveImage", images=["decoded", 0], filename_prefix="sweep"),
        "grid": node("MixologyLabelledGrid", images=["decoded", 0], columns=0, across=["sweep", 5],
                     down=["sweep", 6], settings=CAPTION)}


def pictures_of(run: Run) -> list[Any]:
    return [numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int) for data in run.images["saved"]]


def test_any_widget_takes_a_list(server: Any) -> None:
    """A decimal, a whole number and a name of a list, in all combinations; each the picture of its own settings."""
    sweep = node("MixologySweep", values="cfg = 1.5, 4", values_2="2, 3", values_3="euler, dpmpp_2m")
    run = server.post(make_prompt(sweep, cfg=["sweep", 0], steps=["sweep", 3], sampler_name=["sweep", 4]))
    found = pictures_of(run)
    assert len(found) == 8 and len(run.images["grid"]) == 1
    for place, (cfg, steps, name) in {0: (1.5, 2, "euler"), 3: (4.0, 3, "euler"), 6: (1.5, 3, "dpmpp_2m")}.items():
        alone = make_prompt(sweep, cfg=cfg, steps=steps, sampler_name=name)
        del alone["sweep"], alone["grid"]
        expected, = pictures_of(server.post(alone))
        assert abs(found[place] - expected).max() <= 1, place
    assert all(abs(one - other).max() > 2 for one, other in zip(found, found[1:]))


def test_a_batch_gives_what_the_list_gives(server: Any) -> None:
    """What the help page says of nu."""
    def post(**mix: Any) -> list[Any]:
        prompt = make_prompt(node("MixologySweep", values="0.2, 0.9"))
        prompt["drawn"] = node("MixologyDemoPicture", caption="a plain yellow moon on a blue background", seed=3,
                               width=64, height=64)
        prompt["latent"] = node("VAEEncode", pixels=["drawn", 0], vae=["model", 2])
        prompt["layout"] = node("MixologyLayoutNoise", latent=["latent", 0], seed=3, noise_mode="shared")
        settings = {**{key: prompt["sampled"]["inputs"][key] for key in (
            "model", "positive", "negative", "seed", "cfg", "sampler_name", "scheduler")}, "steps": 6, **mix}
        prompt["sampled"] = node("MixologyLayoutMixKSampler", layout=["layout", 0], **{
            "k_max": 0.6, "k_min": 0.3, "nu": 0.5, "nu_per_image": "", "variant": "paper", **settings})
        prompt["grid"]["inputs"] = {"images": ["decoded", 0], "columns": 2}
        return pictures_of(server.post(prompt))

    listed, batch = post(nu=["sweep", 0]), post(nu_per_image="0.2, 0.9")
    assert len(listed) == len(batch) == 2
    assert all(abs(one - other).max() <= 2 for one, other in zip(listed, batch))
    assert abs(listed[0] - listed[1]).max() > 20


def test_what_was_made_is_kept(server: Any) -> None:
    def ran(values: str) -> set[str]:
        nodes: set[str] = set()
        server.post(make_prompt(node("MixologySweep", values=values), cfg=["sweep", 0]),
                    lambda event: nodes.add(str(event.data.get("node"))) if event.kind == "executing" else None)
        return nodes

    ran("2.5, 3.5")
    assert "sampled" not in ran("2.5, 3.5") and "sampled" in ran("2.5, 3.75")
