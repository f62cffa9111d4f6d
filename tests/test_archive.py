"""The archive alone, as the registry hands it out, in a bare folder of a real server."""
from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import archive_rig
import pytest
from PIL import Image
from titles import DEMO, template_path
from workflow import Workflow

pytestmark = [pytest.mark.server, pytest.mark.slow,
              pytest.mark.skipif(not archive_rig.is_checkout(), reason="no git checkout, so no list of its files")]
NAME = "mixology"  # the folder that an install from the registry makes
SIDE, STEPS = 128, 10


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive_rig.unpack(tmp_path_factory.mktemp("comfyui") / "custom_nodes" / NAME)


@pytest.fixture(scope="module")
def bare(unpacked: Path) -> Iterator[Any]:
    """A server that sees the archive and no checkout."""
    import environment
    from comfyui import Server

    with Server(environment.current(), name="archive", arguments=[
            "--base-directory", str(unpacked.parent.parent), "--disable-api-nodes"]) as running:
        yield running


@pytest.fixture(scope="module")
def definitions(bare: Any) -> dict[str, Any]:
    return bare.object_info()


def test_all_nodes_are_offered(definitions: dict[str, Any], pack: dict[str, Any]) -> None:
    offered = {name for name in definitions if name.startswith("Mixology")}
    assert offered == set(pack)
    assert {definitions[name]["python_module"] for name in offered} == {f"custom_nodes.{NAME}"}


def test_a_template_runs(bare: Any, unpacked: Path, definitions: dict[str, Any]) -> None:
    path = unpacked / "workflows" / template_path(f"magicmix_image_text{DEMO}").name
    workflow = Workflow.load(path, definitions)
    for name in workflow.ids("MixologyLayoutMixKSampler"):
        workflow.set_inputs(name, steps=STEPS)
    run = bare.post(workflow.prompt, seconds=300)
    assert run.status == "success"
    pictures = [Image.open(io.BytesIO(data)) for node in workflow.ids("SaveImage") for data in run.images[node]]
    assert pictures and all(picture.size == (SIDE, SIDE) for picture in pictures)
    for low, high in (picture.convert("L").getextrema() for picture in pictures):
        assert int(high) - int(low) > 20, "a picture is blank"  # pyright: ignore[reportArgumentType]


def test_help_pages_and_their_pictures_are_served(bare: Any, unpacked: Path, pack: dict[str, Any]) -> None:
    docs = unpacked / "web" / "docs"
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    assert set(pages) >= {f"{name}.md" for name in pack}
    for page in pages:
        text = bare.get(f"/extensions/{NAME}/docs/{page}").decode("utf-8")
        assert text.strip(), page
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text):
            address = posixpath.normpath(posixpath.join(f"/extensions/{NAME}/docs", picture))
            assert bare.get(address).startswith(b"\xff\xd8"), f"{page} shows {address}"


def test_translations_are_served(bare: Any, pack: dict[str, Any]) -> None:
    assert set(bare.get_json("/i18n")["zh"]["nodeDefs"]) >= set(pack)


def test_templates_and_their_pictures_are_served(bare: Any, unpacked: Path) -> None:
    names = {path.stem for path in (unpacked / "workflows").glob("*.json")}
    assert names and set(bare.get_json("/workflow_templates")[NAME]) == names


def test_blueprints_are_served(bare: Any, unpacked: Path) -> None:
    names = {path.stem for path in (unpacked / "subgraphs").glob("*.json")}
    served = {entry["name"] for entry in bare.get_json("/global_subgraphs").values()
              if entry["info"]["node_pack"] == f"custom_nodes.{NAME}"}
    assert names and served == names
