"""A sweep over two servers, by the lines of docs/several_machines.md: the pictures that one server makes."""
from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfyui import Server
from PIL import Image, ImageChops
from titles import template_path
from workflow import Workflow

pytestmark = [pytest.mark.server, pytest.mark.wide]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "several_machines.md"
VALUES = [0.0, 0.5, 1.0]


def read_script(addresses: list[str], node: str) -> str:
    """The page's lines, with servers, node and values of this test."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    script, count = re.subn(r"(?m)^SERVERS = .*$", f"SERVERS = {addresses!r}", code[1])
    values = f"NODE, INPUT, VALUES = {(node, 'nu', VALUES)!r}"
    script, other = re.subn(r"(?m)^NODE, INPUT, VALUES = .*$", values, script)
    assert count == other == 1
    return script


def strip_of(server: Server, workflow: Workflow, node: str) -> Image.Image:
    """What one server makes of all values, side by side."""
    pictures = []
    for value in VALUES:
        workflow.set_inputs(node, nu=value)
        run = server.post(workflow.prompt)
        pictures.append(Image.open(io.BytesIO(run.images[workflow.find("Save Image")][0])).convert("RGB"))
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * width, height))
    for index, picture in enumerate(pictures):
        strip.paste(picture, (index * width, 0))
    return strip


def test_a_sweep_over_two_servers(server: Any, tmp_path: Path) -> None:
    workflow = Workflow.load(template_path("magicmix_image_text_demo"), server.object_info())
    node = workflow.find("Layout Mix")
    workflow.set_inputs(node, nu_per_image="", steps=6)
    with Server(server.host, name="pair") as other:
        (tmp_path / "workflow_api.json").write_text(json.dumps(workflow.prompt), encoding="utf-8")
        (tmp_path / "sweep.py").write_text(read_script([server.address, other.address], node), encoding="utf-8")
        subprocess.run([sys.executable, "sweep.py"], cwd=tmp_path, check=True, timeout=300)
        histories = [len(one.get_json("/history")) for one in (server, other)]
    assert histories[1] == 1 and histories[0] >= 2, "both were asked"
    found, expected = Image.open(tmp_path / "grid.png"), strip_of(server, workflow, node)
    assert found.size == expected.size and len(found.getcolors(1 << 20) or ()) > 50
    assert sum(ImageChops.difference(found, expected).convert("L").histogram()[2:]) == 0  # no level is 2 off or more
