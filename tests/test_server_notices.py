"""Wiring that would pass in silence: an error, or a notice on a node, through the real server."""
from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.server, pytest.mark.seam, pytest.mark.wide]

SECONDS = 120.0
TEXT_MESSAGE = 3  # the host's number of messages that show a text on a node
SIGN = "\u26a0 Mixology: "


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def text(words: str) -> dict[str, Any]:
    return node("CLIPTextEncode", text=words, clip=["demo", 1])


def sampler(**wires: Any) -> dict[str, Any]:
    return node("KSampler", **{
        "model": ["demo", 0], "seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": ["plain", 0], "negative": ["other", 0], "latent_image": ["empty", 0], "denoise": 1.0, **wires})


BASE = {"demo": node("MixologyDemoCheckpoint", name="shapes"), "plain": text("a red star"), "other": text(""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1)}
SCALED = node("MixologyTokenScale", model=["demo", 0], clip=["demo", 1], text="a red star", scales="star = -1",
              start_percent=0.0, end_percent=1.0)
MERGED = node("MixologyAttentionMerge", model=["demo", 0], masks=["masks", 0],
              **{"conditionings.conditioning_0": ["plain", 0], "conditionings.conditioning_1": ["other", 0]})
MARKS = {"Token Attention Scale": {**BASE, "ours": SCALED}, "Cross-Attention Merge": {
    **BASE, "ours": MERGED, "masks": node(
        "MixologyGradientMask", width=64, height=64, profile="linear", parts=2, angle=0.0, sharpness=20.0, rows=1)}}


def run(server: Any, graph: dict[str, Any], seen: str = "sampled", output: int = 0) -> dict[str, str]:
    """Runs a graph whose latent is `seen`; returns the notices by the node that shows them."""
    shown: dict[str, str] = {}

    def listen(event: Any) -> None:
        if event.kind == "preview" and int.from_bytes(event.data[:4], "big") == TEXT_MESSAGE:
            length = int.from_bytes(event.data[4:8], "big")
            shown[event.data[8:8 + length].decode()] = event.data[8 + length:].decode()

    ends = {"decoded": node("VAEDecode", samples=[seen, output], vae=["demo", 2]),
            "end": node("PreviewImage", images=["decoded", 0])}
    server.post({**graph, **ends}, listen, seconds=SECONDS)
    assert all(notice.startswith(SIGN) for notice in shown.values())
    return {place: notice.removeprefix(SIGN) for place, notice in shown.items()}


# --------------------------------------------------------------------------------------------------- marks

@pytest.mark.parametrize("name", MARKS)
def test_a_marked_prompt_on_another_model_is_an_error(server: Any, name: str) -> None:
    from commands import Failure

    with pytest.raises(Failure, match=f"{name} expected its prompt to be sampled with its MODEL output, got a model"):
        run(server, {**MARKS[name], "sampled": sampler(positive=["ours", 1])})


@pytest.mark.parametrize("name", MARKS)
def test_a_patched_model_without_its_prompt_is_told_of_on_the_sampler(server: Any, name: str) -> None:
    """Wired past it, or lost in a node that keeps another prompt's marks."""
    graph = MARKS[name]
    (place, notice), = run(server, {**graph, "sampled": sampler(model=["ours", 0])}).items()
    assert place == "sampled" and notice.startswith(f"{name} did nothing in this run")
    joined = node("ConditioningConcat", conditioning_to=["other", 0], conditioning_from=["ours", 1])
    assert list(run(server, {**graph, "joined": joined, "sampled": sampler(
        model=["ours", 0], positive=["joined", 0])})) == ["sampled"]


@pytest.mark.parametrize("name", MARKS)
def test_a_model_that_nothing_reads_is_told_of_on_its_node(server: Any, name: str) -> None:
    """Also where the prompt's mark is lost, so that no model meets it, and though the node ran well before."""
    graph = {**MARKS[name], "joined": node(
        "ConditioningConcat", conditioning_to=["plain", 0], conditioning_from=["ours", 1])}
    wired, unwired = (sampler(model=[place, 0], positive=["joined", 0], seed=4) for place in ("ours", "demo"))
    assert list(run(server, {**graph, "sampled": wired})) == ["sampled"]
    assert run(server, {**graph, "sampled": unwired}) == {"ours": (
        f"The MODEL output of {name} is connected to nothing, so that its prompt cannot act; connect it to the sampler "
        f"or guider that reads the prompt.")}


@pytest.mark.parametrize("name", MARKS)
def test_a_patched_model_with_its_prompt_is_not(server: Any, name: str) -> None:
    both = sampler(model=["ours", 0], positive=["ours", 1], seed=2)
    assert not run(server, {**MARKS[name], "sampled": both})
    both = sampler(model=["ours", 0], negative=["ours", 1], cfg=1.0)
    assert not run(server, {**MARKS[name], "sampled": both})


# --------------------------------------------------------------------------------------------------- mixes

MIX = {"demo": node("MixologyDemoCheckpoint", name="mixer"), "empty": BASE["empty"], "other": text("a red star"),
       "image": node("MixologyDemoPicture", caption="a red star", seed=1, width=64, height=64),
       "mixer": node("MixologyMixerImage", clip_vision=["demo", 3], image=["image", 0], strength=1.0, x=0.0, y=0.0,
                     width=1.0, height=1.0),
       "mix": node("MixologyMixerConditioning", mixer=["mixer", 0], mode="concat", slots=5),
       "sampled": sampler(positive=["mix", 0], negative=["mix", 1])}


def test_a_mix_with_its_own_negative_and_model_passes(server: Any) -> None:
    assert not run(server, MIX)
    zeroed = node("ConditioningZeroOut", conditioning=["other", 0])
    assert not run(server, {**MIX, "zeroed": zeroed, "sampled": sampler(positive=["mix", 0], negative=["zeroed", 0])})
    assert not run(server, {**MIX, "sampled": sampler(positive=["mix", 0], cfg=1.0)})


def test_a_text_beside_a_mix_is_an_error(server: Any) -> None:
    from commands import Failure

    with pytest.raises(Failure, match="Mixer Conditioning expected its own negative beside its positive, got a prompt"):
        run(server, {**MIX, "sampled": sampler(positive=["mix", 0])})
    assert not run(server, {**MIX, "sampled": sampler(positive=["mix", 0], negative=["mix", 1], seed=3)})
    with pytest.raises(Failure, match="got a prompt's text"):  # though the mix was made before
        run(server, {**MIX, "sampled": sampler(positive=["mix", 0], seed=3)})


@pytest.mark.parametrize("checked", [False, True])
def test_a_demo_checkpoint_for_prompts_is_an_error(server: Any, checked: bool) -> None:
    from commands import Failure

    graph = {**MIX, "demo": node("MixologyDemoCheckpoint", name="shapes")}
    if checked:
        graph["mix"] = node("MixologyMixerConditioning", **graph["mix"]["inputs"], model=["demo", 0])
    with pytest.raises(Failure, match="got the demo checkpoint shapes, which was trained on prompts; choose mixer"):
        run(server, graph)


# --------------------------------------------------------------------------------------------------- inversions

INVERTED = {**BASE, "picture": node("MixologyDemoPicture", caption="a red star", seed=1, width=64, height=64),
            "latent": node("VAEEncode", pixels=["picture", 0], vae=["demo", 2]),
            "inverted": node("MixologyInvert", model=["demo", 0], conditioning=["other", 0], latent=["latent", 0],
                             steps=2, scheduler="normal", rule="ditail"),
            "sigmas": node("BasicScheduler", model=["demo", 0], scheduler="normal", steps=2, denoise=1.0),
            "solver": node("KSamplerSelect", sampler_name="euler"),
            "guider": node("BasicGuider", model=["demo", 0], conditioning=["plain", 0])}


def advanced(add_noise: str) -> dict[str, Any]:
    inputs = sampler(latent_image=["inverted", 1])["inputs"]
    return node("KSamplerAdvanced", **{name: inputs[name] for name in inputs if name not in ("seed", "denoise")},
                add_noise=add_noise, noise_seed=1, start_at_step=0, end_at_step=100,
                return_with_leftover_noise="disable")


def custom(noise: dict[str, Any]) -> dict[str, Any]:
    return {"noise": noise, "sampled": node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["solver", 0], sigmas=["sigmas", 0],
        latent_image=["inverted", 1])}


def old_custom(add_noise: bool) -> dict[str, Any]:
    return {"sampled": node(
        "SamplerCustom", model=["demo", 0], add_noise=add_noise, noise_seed=1, cfg=3.0, positive=["plain", 0],
        negative=["other", 0], sampler=["solver", 0], sigmas=["sigmas", 0], latent_image=["inverted", 1])}


NOISY = {
    "KSampler": {"sampled": sampler(latent_image=["inverted", 1])},
    "through a node": {"twice": node("RepeatLatentBatch", samples=["inverted", 1], amount=2),
                       "sampled": sampler(latent_image=["twice", 0])},
    "KSamplerAdvanced": {"sampled": advanced("enable")},
    "SamplerCustom": old_custom(True),
    "SamplerCustomAdvanced": custom(node("RandomNoise", noise_seed=1))}
FINE = {
    "KSamplerAdvanced": {"sampled": advanced("disable")},
    "SamplerCustom": old_custom(False),
    "SamplerCustomAdvanced": custom(node("DisableNoise")),
    "a second pass": {"first": advanced("disable"), "sampled": sampler(latent_image=["first", 0], denoise=0.5)},
    "Start from Trajectory": {
        "start": node("MixologyTrajectoryStart", trajectory=["inverted", 0]),
        "sampled": node("SamplerCustomAdvanced", noise=["start", 0], guider=["guider", 0], sampler=["solver", 0],
                        sigmas=["start", 1], latent_image=["start", 2])}}


@pytest.mark.parametrize("case", NOISY)
def test_noise_on_noise_is_told_of_on_the_sampler(server: Any, case: str) -> None:
    """In each run, whether or not the inversion is in the host's cache."""
    graph = {**INVERTED, **NOISY[case]}
    for _ in range(2):
        (place, notice), = run(server, graph).items()
        assert place == "sampled" and "adds noise to the latent output of an inversion" in notice


@pytest.mark.parametrize("case", FINE)
def test_an_end_state_without_added_noise_is_fine(server: Any, case: str) -> None:
    assert not run(server, {**INVERTED, **FINE[case]})


def test_the_page_gets_the_script_that_clears_them(server: Any) -> None:
    from environment import PACK

    script = f"/extensions/{PACK}/notices.js"
    assert script in server.get_json("/extensions") and SIGN.encode("unicode_escape") in server.get(script)
