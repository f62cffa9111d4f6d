"""The pack in the real server: its nodes, its templates run from end to end, interrupting, and the pages it serves."""
from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy
import pytest
import torch
from environment import PACK
from mixology.metrics.image import ssim
from PIL import Image
from titles import ALL, DEMO, MODERN, WORKFLOWS, template_path
from workflow import Workflow

pytestmark = [pytest.mark.server, pytest.mark.wide]

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = ROOT / "tests" / "references"  # written anew by --write-references
SIDE, STEPS = 128, 10
ALIKE = 0.9  # SSIM with a JPEG of the picture; a wrong wire gives less than 0.8
INTERRUPTED = ("magicmix_image_text", "magicmix_text_text", "restyle_photo", "dual_style_epsilon", "cocktail_photo",
               "fusion_two_prompts", "mixer_two_pictures")


@pytest.fixture(scope="session")
def definitions(server: Any) -> dict[str, Any]:
    return server.object_info()


def load_template(name: str, definitions: dict[str, Any]) -> Workflow:
    """A template by its short name: one for real checkpoints wired to the demo checkpoint and a drawn picture."""
    workflow = Workflow.load(template_path(name), definitions)
    if name.endswith(DEMO):
        return workflow
    workflow.use_demo_checkpoint()
    workflow.use_demo_picture(caption="a striped red circle on a blue background", width=SIDE, height=SIDE)
    workflow.fit_pictures(SIDE)
    return workflow


def set_steps(workflow: Workflow, steps: int) -> None:
    for node in workflow.prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps


@pytest.mark.seam
def test_all_nodes_are_offered(definitions: dict[str, Any], pack: dict[str, Any]) -> None:
    offered = {name for name in definitions if name.startswith("Mixology")}
    assert offered == set(pack) and offered
    assert all(definitions[name]["python_module"] == f"custom_nodes.{PACK}" for name in offered)


def find_extremes(picture: Image.Image) -> tuple[int, int]:
    """The darkest and the brightest pixel."""
    low, high = picture.convert("L").getextrema()
    return int(low), int(high)  # pyright: ignore[reportArgumentType]


def read_strip(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures of one size, cut out of a strip or not: [B, H, W, C], 0 to 1."""
    pixels = [numpy.asarray(picture.convert("RGB"), dtype="float32") / 255 for picture in pictures]
    return torch.from_numpy(numpy.concatenate(pixels, axis=1)).unflatten(1, (-1, SIDE)).movedim(1, 0)


def saved_pictures(run: Any, workflow: Workflow) -> torch.Tensor:
    """What a run's Save Image nodes wrote, in the order of the nodes: [B, H, W, C]."""
    files = [data for node in sorted(workflow.ids("SaveImage")) for data in run.images[node]]
    return read_strip([Image.open(io.BytesIO(data)) for data in files])


def compare(name: str, pictures: torch.Tensor, write: bool) -> float:
    """Structural similarity of the least alike of a template's pictures to its references."""
    path = REFERENCES / f"{name}.jpg"
    if write:
        strip = (torch.cat(list(pictures), dim=1) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(strip).save(path, quality=92)
    expected = read_strip([Image.open(path)])
    assert len(expected) == len(pictures), f"{name}: {len(pictures)} pictures, {len(expected)} stored"
    return float(ssim(pictures, expected).min())


@pytest.mark.seam
@pytest.mark.parametrize("name", [name for name in ALL if name not in MODERN])  # those: test_modern_templates.py
def test_a_template_paints_its_picture(name: str, server: Any, definitions: dict[str, Any],
                                       pytestconfig: pytest.Config) -> None:
    """The stored one but for rounding: a wrong wire or weight gives another (see below)."""
    workflow = load_template(name, definitions)
    set_steps(workflow, STEPS)
    sheets = workflow.ids("MixologyLabelledGrid")
    for sheet in sheets:  # saved as well: what stands on it
        workflow.set_inputs(*workflow.ids("SaveImage"), images=workflow.prompt[sheet]["inputs"]["images"])
    kinds: list[str] = []
    run = server.post(workflow.prompt, lambda event: kinds.append(event.kind), seconds=300)
    assert run.status == "success" and run.images
    results = (*workflow.ids("SaveImage"), *workflow.ids("PreviewImage"))
    for node, files in ((node, run.images[node]) for node in results):
        pictures = [Image.open(io.BytesIO(data)) for data in files]
        assert all(picture.size == (SIDE, SIDE) for picture in pictures)
        painted = [high - low > 20 for low, high in map(find_extremes, pictures)]
        assert all(painted) if node in workflow.ids("SaveImage") else any(painted), "a picture is blank"
    assert all(len(run.images[sheet]) == 1 for sheet in sheets)
    assert "progress" in kinds, "sampling shows no progress"
    assert "preview" in kinds, "sampling shows no preview"
    alike = compare(name, saved_pictures(run, workflow), bool(pytestconfig.getoption("--write-references")))
    assert alike >= ALIKE, f"{name} paints another picture: structural similarity {alike:.3f}"


def test_a_wrong_wire_paints_another_picture(server: Any, definitions: dict[str, Any]) -> None:
    """So the margin of the test above tells them apart."""
    workflow = load_template("magicmix_image_text", definitions)
    set_steps(workflow, STEPS)
    (sampling,) = workflow.ids("MixologyLayoutMixKSampler")
    inputs = workflow.prompt[sampling]["inputs"]
    inputs["positive"], inputs["negative"] = inputs["negative"], inputs["positive"]
    run = server.post(workflow.prompt, seconds=300)
    assert compare("magicmix_image_text", saved_pictures(run, workflow), False) < ALIKE - 0.1


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_leaves_the_server_ready(name: str, server: Any, definitions: dict[str, Any]) -> None:
    """In each kind of sampling: layout mixing and its recorder, the Cycle Sampler, a merging guider, an inversion, a
    fusion, and the host's own sampler."""
    workflow = load_template(name, definitions)
    set_steps(workflow, 900)
    seen: list[str] = []

    def interrupt_once(event: Any) -> None:
        if event.kind == "progress" and event.data["value"] >= 2 and not seen:
            seen.append(event.kind)
            server.interrupt()

    assert server.post(workflow.prompt, interrupt_once, seconds=300).status == "interrupted"
    set_steps(workflow, 5)
    assert server.post(workflow.prompt, seconds=300).status == "success"


def test_bad_input_is_one_sentence(server: Any, definitions: dict[str, Any]) -> None:
    from commands import Failure

    workflow = load_template("magicmix_image_text", definitions)
    workflow.set("Layout Mix", k_max=0.2, k_min=0.5)
    with pytest.raises(Failure, match="k_max") as caught:
        server.post(workflow.prompt, seconds=300)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_templates_and_their_pictures_are_served(server: Any) -> None:
    listed = server.get_json("/workflow_templates")[PACK]
    assert sorted(listed) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    for name in listed:
        address = f"/api/workflow_templates/{PACK}/{quote(name)}"
        assert json.loads(server.get(f"{address}.json"))["nodes"]
        assert server.get(f"{address}.jpg").startswith(b"\xff\xd8")


def test_help_pages_and_translations_are_served(server: Any, definitions: dict[str, Any]) -> None:
    names = [name for name in definitions if name.startswith("Mixology")]
    assert names
    translations = server.get_json("/i18n")
    for name in names:
        assert server.get(f"/extensions/{PACK}/docs/{name}.md").strip()
        assert server.get(f"/extensions/{PACK}/docs/{name}/zh.md").strip()  # where the front end asks first
        assert name in translations["zh"]["nodeDefs"]
    assert "mixology" in translations["zh"]["nodeCategories"]
