"""What the Comfy registry shows and ships: the project's description, its pictures, and the archive's files."""
from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import archive_rig
import pytest
from PIL import Image

needs_git = pytest.mark.skipif(not archive_rig.is_checkout(), reason="no git checkout, so no list of its files")
TECHNIQUES = ("MagicMix", "CycleDiffusion", "Diffusion Cocktail", "MagicFusion", "Image Mixer")
RAW = "https://raw.githubusercontent.com/mixology-nodes/comfyui-mixology/main/"
SHIPPED = {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "demo/shapes.safetensors",
           "demo/vae.safetensors", "demo/MODEL_CARD.md", "locales/zh/nodeDefs.json", "web/icon.svg"}
ROOMS = {"attention_patches", "demo", "host", "locales", "metrics", "nodes", "samplers", "subgraphs", "web",
         "workflows"}
BINARY = {".gif", ".jpg", ".png", ".safetensors", ".webp"}
LARGEST = 100 * 2**20


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings the latter
    return toml.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_description_names_every_technique(project: dict[str, Any]) -> None:
    text = project["project"]["description"]
    assert all(name in text for name in TECHNIQUES) and "\n" not in text and len(text) <= 512


def test_the_registry_finds_its_addresses(project: dict[str, Any]) -> None:
    urls = project["project"]["urls"]
    assert {"Homepage", "Repository", "Documentation", "Issues", "Bug Tracker", "Changelog"} <= set(urls)
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert re.fullmatch(r">=\d+\.\d+\.\d+", project["tool"]["comfy"]["requires-comfyui"])


def test_the_hosts_version_is_the_one_that_is_tested(project: dict[str, Any]) -> None:
    import environment

    assert project["tool"]["comfy"]["requires-comfyui"] == f">={environment.OLDEST_VERSION}"


@pytest.mark.parametrize(("name", "sides"), [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_the_registry_gets_pictures_of_its_sizes(name: str, sides: tuple[int, int], project: dict[str, Any],
                                                 root: Path) -> None:
    """At most 400 x 400 and 21:9; no SVG, which the repository's address serves as plain text."""
    url = project["tool"]["comfy"][name]
    assert url.startswith(RAW) and url.endswith(".png")
    path = root / url.removeprefix(RAW)
    assert Image.open(path).size == sides
    assert path.with_suffix(".svg").read_text(encoding="utf-8").startswith("<svg ")


@needs_git
def test_the_archive_holds_what_runs_and_nothing_else() -> None:
    names = archive_rig.list_files()
    assert set(names) >= SHIPPED
    assert {name.split("/")[0] for name in names if "/" in name} <= ROOMS
    assert not [name for name in names if name.startswith("demo/train") or name.endswith("judge.py")]
    assert sum((archive_rig.ROOT / name).stat().st_size for name in names) < LARGEST


@needs_git
def test_every_file_is_plain_on_every_platform() -> None:
    """No symlink, no two names that Windows takes for one, no name that it refuses; text is text by attribute."""
    entries = [entry.split("\t", 1) for entry in archive_rig.ask_git("ls-files", "--stage")]
    assert entries and {entry[0].split()[0] for entry in entries} <= {"100644", "100755"}
    names = [name for _, name in entries]
    assert len({name.lower() for name in names}) == len(names)
    assert not [name for name in names if re.search(r'[<>:"\\|?*]|[ .](/|$)', name)]
    told = archive_rig.ask_git("check-attr", "text", "eol", "--", *names)
    kinds = {(name, key): value for name, key, value in zip(told[::3], told[1::3], told[2::3])}
    for name in names:
        if Path(name).suffix in BINARY:
            assert kinds[name, "text"] == "unset", name
        else:
            assert (kinds[name, "text"], kinds[name, "eol"]) == ("auto", "lf"), name
            assert b"\r" not in (archive_rig.ROOT / name).read_bytes(), name
