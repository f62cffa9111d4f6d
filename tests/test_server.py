"""The pack in the real server: its nodes, its templates run from end to end, interrupting, and the pages it serves."""
from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from environment import PACK
from PIL import Image
from workflow import Workflow

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = sorted(path.name for path in (ROOT / "workflows").glob("*.json"))
SIDE = 128


@pytest.fixture(scope="session")
def definitions(server: Any) -> dict[str, Any]:
    return server.object_info()


def load_template(name: str, definitions: dict[str, Any]) -> Workflow:
    """A template wired to the demo checkpoint and a drawn picture."""
    workflow = Workflow.load(ROOT / "workflows" / name, definitions)
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


def test_there_are_templates() -> None:
    assert len(TEMPLATES) >= 2


def find_extremes(picture: Image.Image) -> tuple[int, int]:
    """The darkest and the brightest pixel."""
    low, high = picture.getextrema()
    return int(low), int(high)  # pyright: ignore[reportArgumentType]


@pytest.mark.seam
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_runs(name: str, server: Any, definitions: dict[str, Any]) -> None:
    workflow = load_template(name, definitions)
    set_steps(workflow, 10)
    kinds: list[str] = []
    run = server.post(workflow.prompt, lambda event: kinds.append(event.kind), seconds=300)
    assert run.status == "success" and run.images
    saving = workflow.ids("SaveImage")
    for node, files in run.images.items():
        pictures = [Image.open(io.BytesIO(data)).convert("L") for data in files]
        assert all(picture.size == (SIDE, SIDE) for picture in pictures)
        painted = [high - low > 20 for low, high in map(find_extremes, pictures)]
        assert all(painted) if node in saving else any(painted), "a picture is blank"  # a map may have one winner
    assert "progress" in kinds, "sampling shows no progress"
    assert "preview" in kinds, "sampling shows no preview"


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_interrupt_leaves_the_server_ready(name: str, server: Any, definitions: dict[str, Any]) -> None:
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

    workflow = load_template("magicmix_image_text.json", definitions)
    workflow.set("Layout Mix", k_max=0.2, k_min=0.5)
    with pytest.raises(Failure, match="k_max") as caught:
        server.post(workflow.prompt, seconds=300)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_templates_and_their_pictures_are_served(server: Any) -> None:
    listed = server.get_json("/workflow_templates")[PACK]
    assert sorted(listed) == [Path(name).stem for name in TEMPLATES]
    for name in TEMPLATES:
        address = f"/api/workflow_templates/{PACK}/{Path(name).stem}"
        assert json.loads(server.get(f"{address}.json"))["nodes"]
        assert server.get(f"{address}.jpg").startswith(b"\xff\xd8")


def test_help_pages_and_translations_are_served(server: Any, definitions: dict[str, Any]) -> None:
    names = [name for name in definitions if name.startswith("Mixology")]
    assert names
    translations = server.get_json("/i18n")
    for name in names:
        assert server.get(f"/extensions/{PACK}/docs/{name}.md").strip()
        assert name in translations["en"]["nodeDefs"] and name in translations["zh"]["nodeDefs"]
