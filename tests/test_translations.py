"""That the pack is Chinese as a whole: names, tooltips, categories and help pages, where the front end looks."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "docs"
CHINESE = re.compile("[\u4e00-\u9fff]")
SAME = {"CFG", "CLIP", "VAE", "Sigmas"}  # as Chinese users of the host read them, too
SYNTAX = re.compile(r"[{}@|]")  # the front end takes these in a translation for its own
FOLDERS = ("mixology", "comfyui-mixology")  # as the registry and as git name the pack's folder
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    return json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def main() -> dict[str, Any]:
    return json.loads((ROOT / "locales" / "zh" / "main.json").read_text(encoding="utf-8"))


def strings(part: Any, where: str) -> Iterator[tuple[str, str]]:
    """All texts of a translation with the keys that lead to them."""
    if isinstance(part, str):
        yield where, part
        return
    for key, inner in part.items():
        yield from strings(inner, f"{where}.{key}")


def group_sockets(schema: io.Schema) -> set[str]:
    """Keys of the sockets that groups grow: `positives.positive_0` is looked for with `_` for its dot."""
    return {f"{group.id}_{name}" for group in schema.inputs if isinstance(group, io.Autogrow.Input)
            for name in group.template.names}


def test_every_node_is_translated(pack: dict[str, Any], definitions: dict[str, Any]) -> None:
    assert set(definitions) == set(pack)
    for name, node in pack.items():
        schema, entry = node.define_schema(), definitions[name]
        assert entry.get("display_name") and entry.get("description"), name
        named = {key: part for key, part in entry.get("inputs", {}).items() if "name" in part}
        assert set(named) == {socket.id for socket in schema.inputs}, name
        assert set(entry.get("outputs", {})) == {str(index) for index in range(len(schema.outputs))}, name
        for part in (*named.values(), *entry.get("outputs", {}).values()):
            assert part.get("name") and part.get("tooltip"), (name, part)


def test_every_socket_says_in_nodes_2_what_it_is(pack: dict[str, Any], definitions: dict[str, Any]) -> None:
    """There the front end (1.47) looks for a socket's tooltip under its translated name, or under its id where it has
    none: so a socket's tooltip stands under its name as well, and those of groups stay without a name."""
    for name, node in pack.items():
        schema, inputs = node.define_schema(), definitions[name].get("inputs", {})
        sockets = [inputs[socket.id] for socket in schema.inputs
                   if not isinstance(socket, io.WidgetInput | io.Autogrow.Input)]
        again = {socket["name"]: {"tooltip": socket["tooltip"]} for socket in sockets}
        assert len(again) == len(sockets), f"{name}: two sockets are named alike"
        assert not [key for key in again if re.search(r"[\s.]", key)], f"{name}: such a name is no key"
        unnamed = {key: part for key, part in inputs.items() if "name" not in part}
        assert set(unnamed) == {*again, *group_sockets(schema)} and all(unnamed.values()), name
        assert {key: unnamed[key] for key in again} == again, (
            f"{name}: inputs of nodeDefs.json end with {json.dumps(again, ensure_ascii=False)}")


def test_every_string_is_chinese(definitions: dict[str, Any], main: dict[str, Any]) -> None:
    for where, text in (*strings(definitions, "nodeDefs"), *strings(main, "main")):
        assert text in SAME or CHINESE.search(text), f"{where} is not Chinese: {text}"
        assert not SYNTAX.search(text), f"{where} has a letter that the front end reads as its own: {text}"


def test_no_string_is_the_english_one(pack: dict[str, Any], definitions: dict[str, Any]) -> None:
    for name, node in pack.items():
        schema, entry = node.define_schema(), definitions[name]
        english = {schema.display_name, schema.description}
        for socket in (*schema.inputs, *schema.outputs):
            english |= {socket.id, socket.display_name, socket.tooltip}
        for where, text in strings(entry, name):
            assert text in SAME or text not in english, f"{where} is English: {text}"


def test_categories_are_translated(pack: dict[str, Any], main: dict[str, Any]) -> None:
    parts = {part for node in pack.values() for part in node.define_schema().category.split("/")}
    assert set(main["nodeCategories"]) >= parts
    assert set(main["templateWorkflows"]["category"]) == set(FOLDERS)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def code(text: str) -> Counter[str]:
    """Code spans; a span may go over a line's end."""
    return Counter(re.findall(r"`([^`]+)`", " ".join(prose(text).split())))


def headings(text: str) -> list[str]:
    return re.findall(r"^#+(?= )", prose(text), re.MULTILINE)


def blocks(text: str) -> list[int]:
    """Of every block between empty lines, how many bullets it has."""
    return [len(re.findall(r"^- ", block, re.MULTILINE)) for block in re.split(r"\n{2,}", prose(text).strip())]


def tables(text: str) -> list[int]:
    """Cells of every row of a table."""
    return [len(re.split(r"(?<!\\)\|", line)) - 2 for line in prose(text).splitlines() if line.startswith("|")]


def targets(text: str) -> list[tuple[str, str]]:
    """Where links lead and pictures lie, in their order: both languages share one folder of pictures."""
    return re.findall(r"!?\[[^]]*\]\(([^)]*)\)|<(?:img|video|source)\b[^>]*\bsrc=\"([^\"]*)\"", text)


def test_every_help_page_is_translated(pack: dict[str, Any]) -> None:
    for name, node in pack.items():
        page = PAGES / name / "zh.md"
        assert page.exists(), f"{name} has no Chinese help page"
        english, chinese = (path.read_text(encoding="utf-8") for path in (PAGES / f"{name}.md", page))
        for compare in (headings, blocks, tables, targets, code, FENCE.findall):
            assert compare(chinese) == compare(english), f"{page.relative_to(ROOT)} has other {compare.__name__}"
        missing = [socket.id for socket in node.define_schema().inputs if socket.id not in chinese]
        assert not missing, f"{page.relative_to(ROOT)} does not speak of {missing}"


def test_every_line_of_the_help_pages_is_chinese(pack: dict[str, Any]) -> None:
    for name in pack:
        for line in prose((PAGES / name / "zh.md").read_text(encoding="utf-8")).splitlines():
            bare = re.fullmatch(r"[-|\s]*|!\[\]\([^)]*\)|<(?:img|video|source)\b.*>", line)
            assert bare or CHINESE.search(line), f"{name}/zh.md: {line}"


def test_bold_text_ends_where_markdown_sees_it(pack: dict[str, Any]) -> None:
    """Beside a letter Markdown leaves `**` as it is after or before a mark such as a full stop."""
    for name in pack:
        text = prose((PAGES / name / "zh.md").read_text(encoding="utf-8"))
        for found in re.finditer(r"(.?)\*\*(.+?)\*\*(.?)", text):
            before, inside, after = found.groups()
            assert not (re.match(r"\W", inside) and re.match(r"\w", before)), f"{name}/zh.md: {found.group()}"
            assert not (re.search(r"\W$", inside) and re.match(r"\w", after)), f"{name}/zh.md: {found.group()}"


def test_folders_of_help_pages_are_nodes(pack: dict[str, Any]) -> None:
    assert {path.parent.name for path in PAGES.glob("*/zh.md")} == set(pack)
