"""Templates and blueprints are what `tools/templates.py` makes of the nodes as they are, and say what they need."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from blueprints import BLUEPRINTS, FOLDER, render
from PIL import Image
from template_rig import describe
from templates import build
from titles import ALL, DEMO, DEMOS, MODERN, TITLES, WORKFLOWS, template_path, title
from workflow import convert

SAVED = Path(__file__).resolve().parent / "saved"  # templates of earlier versions, as people keep them
LOADERS = {"CheckpointLoaderSimple", "LoraLoader", "CLIPLoader", "CLIPVisionLoader", "VAELoader", "UNETLoader",
           "DualCLIPLoader"}
FOLDERS = {"CheckpointLoaderSimple": "checkpoints", "LoraLoader": "loras", "CLIPVisionLoader": "clip_vision",
           "VAELoader": "vae", "UNETLoader": "diffusion_models"}
TECHNIQUES = {"MagicMix", "Token Scale", "Dual Style", "Cocktail", "MagicFusion", "Image Mixer", "Evaluate"}


def read(name: str) -> dict[str, Any]:
    return json.loads(template_path(name).read_text(encoding="utf-8"))


def test_every_template_is_made_by_the_tool() -> None:
    assert {path.name for path in WORKFLOWS.glob("*.json")} == {template_path(name).name for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_what_is_committed_is_what_is_made(name: str, loaded: Any) -> None:
    committed = template_path(name).read_text(encoding="utf-8")
    assert build(name, *loaded) == committed, f"run tools/templates.py: {name} has changed"


def test_titles_begin_with_their_technique_and_each_has_one_without_files() -> None:
    assert {title.split(" - ")[0] for title in TITLES.values()} == TECHNIQUES
    assert {TITLES[name].split(" - ")[0] for name in DEMOS} == TECHNIQUES
    assert all(re.fullmatch(r"[A-Za-z0-9 ,()-]+", template_path(name).stem) for name in ALL), "for file systems"


@pytest.mark.parametrize("name", ALL)
def test_files_can_be_downloaded_or_none_is_needed(name: str) -> None:
    for node in read(name)["nodes"]:
        listed = node["properties"].get("models", [])
        if name.endswith(DEMO):
            assert node["type"] not in {*LOADERS, "LoadImage"} and not listed
        elif node["type"] in LOADERS:
            assert [file["name"] for file in listed] == node["widgets_values"][:2 if "Dual" in node["type"] else 1]
            for file in listed:
                assert file["url"].startswith("https://huggingface.co/") and "/resolve/" in file["url"]
                assert name not in MODERN or file["url"].endswith(f"/{file['name']}")
                assert file["directory"] == FOLDERS.get(node["type"], "text_encoders")


@pytest.mark.parametrize("name", ALL)
def test_a_template_explains_itself(name: str, loaded: Any) -> None:
    """Numbered groups; a note top left without code; titles that say which node it is; something to change."""
    graph = read(name)
    assert [group["title"].split(".")[0] for group in graph["groups"]] == [
        str(number) for number in range(1, len(graph["groups"]) + 1)]
    note, = (node for node in graph["nodes"] if node["type"] == "MarkdownNote")
    text = note["widgets_values"][0]
    assert note["pos"] == [0, 0] and "`" not in text and "Change:" in text
    assert 3 <= len(text.split("\n\n")) <= 4
    nodes = [node for node in graph["nodes"] if node is not note]
    assert any("color" in node for node in nodes)
    for node in nodes:
        own = loaded[1].get(node["type"], node["type"])
        if "title" in node:
            assert node["title"] != own and node["title"].startswith(own.removesuffix(" (Prompt)") + " (")


def test_every_template_has_a_square_picture() -> None:
    for name in ALL:
        width, height = Image.open(template_path(name).with_suffix(".jpg")).size
        assert width == height >= 256, name


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.json")), ids=lambda path: path.stem)
def test_workflows_of_earlier_templates_still_load(path: Path, loaded: Any) -> None:
    """Every node, link and widget of theirs means what it meant."""
    definitions = {kind: describe(kind, loaded[0][kind]) for kind in {
        node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]} if kind != "MarkdownNote"}
    prompt = convert(json.loads(path.read_text(encoding="utf-8")), definitions, path.name)
    for node in prompt.values():
        if node["class_type"].startswith("Mixology"):
            known = {name for group in loaded[0][node["class_type"]].INPUT_TYPES().values() for name in group}
            assert {key.split(".")[0] for key in node["inputs"]} <= known, node


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprints_are_made_by_the_tool(name: str, loaded: Any) -> None:
    committed = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert render(name, *loaded) == committed, f"run tools/templates.py: {name} has changed"
    outer, inner = json.loads(committed)["nodes"][0], json.loads(committed)["definitions"]["subgraphs"][0]
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == name
    assert all(socket["linkIds"] for socket in inner["inputs"]), "an input that leads nowhere"


def test_every_help_page_shows_a_picture_and_names_a_template() -> None:
    pages = sorted((WORKFLOWS.parent / "web" / "docs").glob("*.md"))
    assert len(pages) >= 24
    for page in pages:
        text = page.read_text(encoding="utf-8")
        picture = re.search(r"!\[[^\]]+\]\(\.\./(pictures/\w+\.jpg)\)", text)
        assert picture and (page.parent.parent / picture.group(1)).exists(), f"{page.name}: no picture"
        template = re.search(r"^Template: \*([^*]+)\*", text, re.MULTILINE)
        assert template and (WORKFLOWS / f"{template.group(1)}.json").exists(), f"{page.name}: no template"


@pytest.mark.parametrize("name", MODERN)
def test_a_template_for_one_family_is_named_where_people_look(name: str) -> None:
    """In README, and on the help pages, in both languages, of its nodes."""
    listed = f"*{title(name)}*"
    assert listed in (WORKFLOWS.parent / "README.md").read_text(encoding="utf-8")
    kinds = {node["type"] for node in read(name)["nodes"] if node["type"].startswith("Mixology")}
    for kind in kinds:
        for page in (f"{kind}.md", f"{kind}/zh.md"):
            assert listed in (WORKFLOWS.parent / "web" / "docs" / page).read_text(encoding="utf-8"), page
