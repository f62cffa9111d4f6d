"""Templates for separate files: the host lacks nothing but the files, and with tiny models they run from end to end."""
from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import execution
import folder_paths
import pytest
import torch
from PIL import Image
from template_rig import SIDE, read_workflow, run, shrink
from titles import ALL, DEMO, MODERN, PICTURES, template_path
from workflow import Workflow

pytestmark = pytest.mark.seam

FILES = {  # inputs that name a file
    "CheckpointLoaderSimple": {"ckpt_name"}, "LoraLoader": {"lora_name"}, "CLIPVisionLoader": {"clip_name"},
    "UNETLoader": {"unet_name"}, "VAELoader": {"vae_name"}, "CLIPLoader": {"clip_name"},
    "DualCLIPLoader": {"clip_name1", "clip_name2"},
}
CHANGED = {  # what a note tells to change: the node, its input, and another value
    "token_scale": ("MixologyTokenScale", "scales", "red = [-1, 1, 2]"),
    "layout": ("MixologyLayoutMixKSampler", "nu", 0.2),
    "regions": ("Right", "text", "a village by the sea in autumn"),
    "cocktail": ("What it shall become", "text", "a drawing in black ink of a girl in a pink dress on a green hill"),
}


@pytest.fixture(scope="module", autouse=True)
def picture(host_folders: None) -> None:
    """The picture that ComfyUI comes with."""
    gradient = torch.linspace(0, 255, 96).repeat(96, 1).to(torch.uint8)
    pixels = torch.stack([gradient, gradient.T, gradient.flip(0)], -1).numpy()
    Image.fromarray(pixels).save(Path(folder_paths.get_input_directory()) / "example.png")


def find_trouble(prompt: dict[str, Any]) -> set[tuple[str, str, str]]:
    """What the host's own check of a prompt says: node class, kind of error, input."""
    _, _, _, errors = asyncio.run(execution.validate_prompt("prompt", prompt, None))
    return {(node["class_type"], error["type"], error["extra_info"].get("input_name", ""))
            for node in errors.values() for error in node["errors"]}


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith(DEMO)])
def test_only_files_are_missing(name: str, loaded: Any) -> None:
    """Every node, type, sampler, scheduler and number is one that the host knows."""
    prompt = read_workflow(name, loaded[0]).prompt
    kinds = {node["class_type"] for node in prompt.values()}
    assert find_trouble(prompt) == {
        (kind, "value_not_in_list", key) for kind, keys in FILES.items() if kind in kinds for key in keys}


def test_a_setting_that_the_host_lacks_is_seen(loaded: Any) -> None:
    """So the test above can fail."""
    workflow = read_workflow("layout_flux", loaded[0])
    workflow.set("MixologyLayoutMixKSampler", sampler_name="res_multistop", steps=0)
    workflow.set("DualCLIPLoader", type="flux3")
    assert find_trouble(workflow.prompt) >= {
        ("MixologyLayoutMixKSampler", "value_not_in_list", "sampler_name"),
        ("MixologyLayoutMixKSampler", "value_smaller_than_min", "steps"),
        ("DualCLIPLoader", "value_not_in_list", "type")}


@pytest.fixture(scope="module")
def paint(loaded: Any) -> Callable[[str], torch.Tensor]:
    """A small template's pictures, painted once."""
    return functools.cache(lambda name: run(read_small(name, loaded[0]), loaded[0]))


def read_small(name: str, definitions: dict[str, Any]) -> Workflow:
    workflow = read_workflow(name, definitions)
    shrink(workflow)
    return workflow


def find_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.std())


@pytest.mark.parametrize("name", MODERN)
def test_a_template_runs_and_what_is_to_be_changed_acts(name: str, loaded: Any, paint: Any) -> None:
    """On tiny models with random weights of the family's own classes, from the prompt to the picture."""
    workflow, pictures = read_small(name, loaded[0]), paint(name)
    assert pictures.shape == (3 if name.startswith("token_scale") else 1, SIDE, SIDE, 3)
    assert pictures.isfinite().all() and float(pictures.std()) > 0.01
    node, key, value = next(change for start, change in CHANGED.items() if name.startswith(start))
    assert workflow.prompt[workflow.find(node)]["inputs"][key] != value
    workflow.set(node, **{key: value})
    assert find_distance(pictures, run(workflow, loaded[0])) > 1e-3


@pytest.mark.parametrize("name", [name for name in MODERN if name.startswith("token_scale")])
def test_each_picture_has_its_own_scale(name: str, loaded: Any, paint: Any) -> None:
    """From one noise, at cfg 1: without scales all three are the second."""
    workflow, scaled = read_small(name, loaded[0]), paint(name)
    assert find_distance(scaled[1], scaled[0]) > 1e-3 and find_distance(scaled[1], scaled[2]) > 1e-3
    workflow.set("MixologyTokenScale", scales="fluffy = 1")
    assert all(find_distance(scaled[1], plain) < 1e-4 for plain in run(workflow, loaded[0]))


@pytest.mark.parametrize("name", [name for name in MODERN if name.startswith("regions")])
def test_one_prompt_in_all_regions_is_that_prompt_alone(name: str, loaded: Any) -> None:
    workflow = read_small(name, loaded[0])
    workflow.set("Right", text=workflow.prompt[workflow.find("Left")]["inputs"]["text"])
    merged, merge = run(workflow, loaded[0]), workflow.find("MixologyAttentionMerge")
    sources = workflow.prompt[merge]["inputs"]
    for node in workflow.prompt.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == merge:
                node["inputs"][key] = sources[("model", "conditionings.conditioning_0")[value[1]]]
    assert find_distance(run(workflow, loaded[0]), merged) < 1e-3


@pytest.mark.parametrize("name", MODERN)
def test_its_picture_is_the_demo_checkpoints(name: str) -> None:
    """No picture claims to be by a model that was never run."""
    pictures = [template_path(one).with_suffix(".jpg").read_bytes() for one in (name, PICTURES[name])]
    assert pictures[0] == pictures[1]
