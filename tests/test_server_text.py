"""What users write never ends the server's queue, whatever its console can show: every fault is one sentence, and the
next prompt runs."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.server, pytest.mark.wide]

CONSOLES = {"utf-8": {"PYTHONIOENCODING": "utf-8"}, "cp1252": {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}}
STAR, HALF = "\u661f", "\ud800"  # no letter of cp1252, and half of one of no encoding
SECONDS = 60.0


@pytest.fixture(scope="module", params=CONSOLES)
def console(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server of its own, whose log goes to a console of one encoding."""
    import environment
    from comfyui import Server

    host = environment.current()
    with Server(host, paths_file=environment.paths_file(host), name=f"console-{request.param}",
                arguments=["--disable-api-nodes"], variables=CONSOLES[request.param]) as running:
        yield running


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


DEMO = node("MixologyDemoCheckpoint", name="shapes")
PICTURE = node("MixologyDemoPicture", caption="a red star", seed=1, width=64, height=64)
LATENT = {"demo": DEMO, "picture": PICTURE, "latent": node("VAEEncode", pixels=["picture", 0], vae=["demo", 2])}
INVERTED = {**LATENT, "prompt": node("CLIPTextEncode", text="", clip=["demo", 1]),
            "inverted": node("MixologyInvert", model=["demo", 0], conditioning=["prompt", 0], latent=["latent", 0],
                             steps=2, scheduler="ddim_uniform", rule="ditail")}
LAYOUT = {**LATENT, "layout": node("MixologyLayoutNoise", latent=["latent", 0], seed=0, noise_mode="shared"),
          "solver": node("KSamplerSelect", sampler_name="euler")}
GOOD = {"picture": PICTURE, "shown": node("PreviewImage", images=["picture", 0])}


def shown(part: dict[str, Any], kind: str, **inputs: Any) -> dict[str, Any]:
    """A prompt that runs one node and looks at its first output."""
    return {**part, "node": node(kind, **inputs), "shown": node("PreviewAny", source=["node", 0])}


def scaled(text: str, scales: str) -> dict[str, Any]:
    return shown({"demo": DEMO}, "MixologyTokenScale", model=["demo", 0], clip=["demo", 1], text=text, scales=scales,
                 start_percent=0.0, end_percent=1.0)


def mixed(nu_per_image: str) -> dict[str, Any]:
    return shown(LAYOUT, "MixologyLayoutMixSampler", sampler=["solver", 0], layout=["layout", 0], nu=0.5, k_max=0.6,
                 k_min=0.3, nu_per_image=nu_per_image, variant="paper")


CASES: dict[str, tuple[dict[str, Any], str]] = {}
for letter in (STAR, HALF):
    CASES |= {
        f"nu_per_image {letter!a}": (mixed(letter), "nu_per_image"),
        f"caption {letter!a}": (
            {"picture": node("MixologyDemoPicture", caption=f"a {letter}", seed=0, width=64, height=64),
             "shown": node("PreviewImage", images=["picture", 0])}, "MixologyDemoPicture: "),
        f"trajectory {letter!a}": (
            shown({}, "MixologyLoadTrajectory", name=f"{letter}.safetensors"), "finds no trajectory '"),
        f"demo {letter!a}": (shown({}, "MixologyDemoCheckpoint", name=letter), "Demo Checkpoint finds no '"),
        f"prefix {letter!a}": (
            {**INVERTED, "saved": node("MixologySaveTrajectory", trajectory=["inverted", 0],
                                       filename_prefix=f"{letter}\x01")}, "filename_prefix"),
    }
CASES |= {
    "text of a mix": (shown({"demo": DEMO}, "MixologyMixerText", clip=["demo", 1], text=HALF, strength=1.0), "half"),
    "a prompt of the demo world": (shown({"demo": DEMO}, "CLIPTextEncode", clip=["demo", 1], text=HALF), "half"),
    "a name that is a number": (shown({}, "MixologyLoadTrajectory", name=7), "finds no trajectory '7'"),
    "a name that is a list": (
        shown({}, "MixologyDemoCheckpoint", name={"__value__": [1, 2, 3]}), r"Demo Checkpoint finds no '\[1, 2, 3\]'"),
    "no number": (
        shown({}, "MixologyGradientMask", width=64, height=64, profile="linear", parts=2, angle=float("nan"),
              sharpness=1.0, rows=1), "angle of Gradient Masks expects a number from -360 to 360, got nan; set it"),
    "linked beyond the schema": (
        shown({"side": node("PrimitiveInt", value=10 ** 9)}, "MixologyGradientMask", width=["side", 0], height=64,
              profile="linear", parts=2, angle=0.0, sharpness=1.0, rows=1),
        "width of Gradient Masks expects a whole number from 1 to 16384, got 1000000000; set it"),
}
for letter in (STAR, HALF):
    CASES |= {
        f"scales {letter!a}": (scaled("a red star", f"{letter} = 1"), "MixologyTokenScale: "),
        f"scales without a number {letter!a}": (scaled("a red star", f"star = {letter}"), "MixologyTokenScale: "),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_text_is_answered_in_a_sentence_and_the_queue_lives(case: str, console: Any) -> None:
    from commands import Failure

    prompt, words = CASES[case]
    with pytest.raises(Failure, match=words) as caught:
        console.post(prompt, seconds=SECONDS)
    answer = str(caught.value)
    assert "\n" not in answer and "codec" not in answer and "Traceback" not in answer, answer
    run = console.post(GOOD, seconds=SECONDS)
    assert run.status == "success" and run.images
