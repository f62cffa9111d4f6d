"""What a person sees in the real front end: templates that open whole and run at once, search, help, translations."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gui
import pytest
from blueprints import BLUEPRINTS
from environment import PACK
from gui import Box, Gui
from titles import ALL, DEMO, DEMOS, template_path, title

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SAVED = sorted((Path(__file__).resolve().parent / "saved").glob("*.json"))
RENDERERS = {"classic": False, "modern": True}  # the canvas, and Nodes 2.0
WIDEST, BETWEEN = 1700, 60
SEARCHED = {  # what people type, and the node that they should see first
    "magicmix": "MixologyLayoutMixKSampler", "semantic mixing": "MixologyLayoutMixKSampler",
    "keep composition": "MixologyLayoutMixKSampler", "cocktail": "MixologyCocktailKSampler",
    "diffusion cocktail": "MixologyCocktailKSampler", "structure transfer": "MixologyCocktailKSampler",
    "cyclediffusion": "MixologyCycleSampler", "cycle diffusion": "MixologyCycleSampler",
    "dual style": "MixologyEpsilonMergeGuider", "two styles": "MixologyEpsilonMergeGuider",
    "magicfusion": "MixologySaliencyGuider", "mix models": "MixologySaliencyGuider",
    "ensemble": "MixologySaliencyGuider", "image mixer": "MixologyMixerImage", "ip-adapter": "MixologyMixerImage",
    "ipadapter": "MixologyMixerImage", "redux": "MixologyMixerImage", "negpip": "MixologyTokenScale",
    "token weight": "MixologyTokenScale", "remove object": "MixologyTokenScale",
    "\u98ce\u683c\u8fc1\u79fb": "MixologyCocktailKSampler", "\u9e21\u5c3e\u9152": "MixologyCocktailKSampler",
    "\u56fe\u751f\u56fe": "MixologyLayoutMixKSampler", "\u4fdd\u6301\u6784\u56fe": "MixologyLayoutMixKSampler",
    "\u5faa\u73af\u6269\u6563": "MixologyCycleSampler", "\u79fb\u9664\u7269\u4f53": "MixologyTokenScale",
}
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def page(browser: Any, server: Any) -> Iterator[Gui]:
    page = gui.new_page(browser)
    page.open(server.address)
    yield page
    page.page.close()


def saved_widgets(path: Path) -> dict[str, list[Any]]:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return {str(node["id"]): node["widgets_values"] for node in nodes}


def find_overlaps(boxes: list[Box]) -> list[tuple[str, str]]:
    return [(a.name, b.name) for index, a in enumerate(boxes) for b in boxes[:index] if a.overlaps(b)]


def find_crowded(boxes: list[Box]) -> list[tuple[str, str, float]]:
    """Nodes of one column with less than 60 pixels between them."""
    pairs = [(a, b, b.y - a.y - a.height) for a in boxes for b in boxes
             if a is not b and a.x == b.x and a.y < b.y and a.kind != "MarkdownNote"]
    return [(a.name, b.name, gap) for a, b, gap in pairs if gap < BETWEEN]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_templates_open_whole(renderer: str, page: Gui) -> None:
    """All nodes, their saved values, no error, nothing over another, room between rows, in a usual window's width."""
    page.set("Comfy.VueNodes.Enabled", RENDERERS[renderer])
    trouble: dict[str, Any] = {}
    for name in ALL:
        page.load(template_path(name))
        boxes = page.boxes(RENDERERS[renderer])
        width = max(box.x + box.width for box in boxes) - min(box.x for box in boxes)
        shown = page.widgets()
        changed = {key: (values, shown.get(key)) for key, values in saved_widgets(template_path(name)).items()
                   if shown.get(key) != values}
        found = (page.missing_nodes(), page.errors, find_overlaps(boxes), find_crowded(boxes), changed,
                 [f"{width:.0f} wide"] * (width > WIDEST))
        if any(found):
            trouble[name] = [part for part in found if part]
    assert not trouble


def test_overlaps_and_crowding_are_seen() -> None:
    """So the test above can fail."""
    first, second = Box("a", "A", 0, 0, 100, 100), Box("b", "B", 0, 90, 100, 100)
    assert find_overlaps([first, second]) == [("b", "a")]
    assert find_crowded([first, Box("b", "B", 0, 150, 100, 100)]) == [("a", "b", 50)]
    assert not find_overlaps([first, Box("b", "B", 101, 0, 9, 9)])


def test_workflows_of_earlier_templates_open(page: Gui) -> None:
    """As people saved them: no node missing, no value moved to another widget."""
    page.set("Comfy.VueNodes.Enabled", False)
    assert len(SAVED) == 18
    trouble = {}
    for path in SAVED:
        page.load(path)
        saved, shown = saved_widgets(path), page.widgets()
        moved = {key: (values, shown.get(key)) for key, values in saved.items()
                 if (shown.get(key) or [])[:len(values)] != values}
        if page.missing_nodes() or moved:
            trouble[path.stem] = (page.missing_nodes(), moved)
    assert not trouble


@pytest.mark.parametrize("name", DEMOS)
def test_a_template_without_files_runs_at_once(name: str, page: Gui) -> None:
    """Browse Templates, a click on its card, Run: a picture."""
    page.set("Comfy.VueNodes.Enabled", True)
    page.open_template(PACK, title(name + DEMO))
    pictures = page.run()
    assert pictures, "no picture was saved"
    assert not page.errors
    assert all(page.page.request.get(address).headers["content-type"] == "image/png" for address in pictures)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_one_node_that_runs(name: str, page: Gui) -> None:
    """Found by its name in the search box, put down, wired to a checkpoint: a picture."""
    page.set("Comfy.VueNodes.Enabled", True)
    page.page.evaluate("() => window.app.graph.clear()")
    page.errors.clear()
    assert page.search(name, add=True)[0] == name
    page.wire("mixer" if name == "Image Mixer" else "shapes", "a striped red star on a blue background")
    assert page.run(), "no picture was saved"
    assert not page.errors


def test_the_search_box_finds_what_people_call_it(page: Gui, server: Any) -> None:
    """By the papers' names, by goals, in Chinese; blueprints, whose words the host does not take, set aside."""
    names = {kind: node["display_name"] for kind, node in server.object_info().items()}
    found = {words: page.search(words) for words in SEARCHED}
    wrong = {words: found[words][:3] for words, kind in SEARCHED.items() if found[words][:1] != [names[kind]]}
    assert not wrong


def test_every_template_shows_its_picture(page: Gui) -> None:
    cards = page.browse_templates(PACK)
    assert cards == {title(name) for name in ALL}
    pictures = page.page.locator("[data-testid^='template-workflow-'] img")
    for index in range(pictures.count()):
        pictures.nth(index).scroll_into_view_if_needed()
        page.page.wait_for_function("image => image.complete && image.naturalWidth",
                                    arg=pictures.nth(index).element_handle())
        assert "default-template" not in (pictures.nth(index).get_attribute("src") or ""), "no picture of its own"
    page.page.keyboard.press("Escape")


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_patch_that_does_nothing_is_told_on_the_node(renderer: str, page: Gui) -> None:
    """The scaled prompt is not wired to the sampler: the sampler says so until it is."""
    page.set("Comfy.VueNodes.Enabled", RENDERERS[renderer])
    page.load(template_path("token_scale" + DEMO))
    wire = """kind => {
      const find = type => window.app.graph.nodes.find(node => node.type === type);
      find('KSampler').widgets.find(widget => widget.name === 'steps').value = 3;
      find(kind).connect(kind === 'CLIPTextEncode' ? 0 : 1, find('KSampler'), 1);
    }"""
    told = """() => window.app.graph.nodes.filter(node => (node.widgets ?? []).some(
      widget => String(widget.value).startsWith('\u26a0 Mixology'))).map(node => node.type)"""
    page.page.evaluate(wire, "CLIPTextEncode")
    page.run()
    page.page.wait_for_function("told => eval(told)().includes('KSampler')", arg=told)
    page.page.evaluate(wire, "MixologyTokenScale")
    page.run()
    page.page.wait_for_function("told => !eval(told)().length", arg=told)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_report_is_shown_on_its_node(renderer: str, page: Gui) -> None:
    """The tables of Image Metrics and of Clip Metrics, which are not saved with the workflow."""
    page.set("Comfy.VueNodes.Enabled", RENDERERS[renderer])
    page.load(template_path("metrics_two_merges" + DEMO))
    page.page.evaluate("""() => window.app.graph.nodes.flatMap(node => node.widgets ?? []).filter(
      widget => widget.name === 'steps').forEach(widget => { widget.value = 3; })""")
    saved = page.widgets()
    page.run()
    shown = """kind => window.app.graph.nodes.filter(node => node.type === kind).map(node => (node.widgets ?? []).find(
      widget => widget.name === '$$mixology-report')?.value ?? '')"""
    page.page.wait_for_function("([shown, kind]) => eval(shown)(kind).every(text => text)",
                                arg=[shown, "MixologyClipMetrics"])
    image, = page.page.evaluate(shown, "MixologyImageMetrics")
    assert image.split()[:2] == ["picture", "L2"] and "LPIPS" in image
    clips = page.page.evaluate(shown, "MixologyClipMetrics")
    assert len(clips) == 2 and all(text.startswith("similarity") and "directional" in text for text in clips)
    assert page.widgets() == saved and not page.errors


def test_own_sockets_have_their_colours(page: Gui) -> None:
    """Also after another theme was chosen, which takes all colours of sockets anew."""
    own = [f"MIXOLOGY_{name}" for name in ("LAYOUT", "TRAJECTORY", "EXPERTS", "MIXER")]
    page.load(template_path("magicmix_image_text" + DEMO))
    read = """types => types.map(type => [
      window.app.canvas.default_connection_color_byType[type], window.app.canvas.constructor.link_type_colors[type],
      getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`)])"""
    before = page.page.evaluate(read, own)
    assert len({colours[0] for colours in before}) == len(own) and all(len(set(colours)) == 1 for colours in before)
    try:
        page.set("Comfy.ColorPalette", "light")
        page.page.wait_for_function("() => document.body.matches(':not(.dark-theme)')")
        page.page.wait_for_timeout(300)
        assert page.page.evaluate(read, own) == before
    finally:
        page.set("Comfy.ColorPalette", "dark")


def test_help_opens_on_a_node(page: Gui) -> None:
    page.set("Comfy.VueNodes.Enabled", False)
    page.load(template_path("token_scale" + DEMO))
    text = page.read_help("MixologyTokenScale")
    assert "Beside other packs" in text, text
    picture = page.page.locator("[class*='node-help'] img").first
    page.page.wait_for_function("image => image.complete && image.naturalWidth > 100", arg=picture.element_handle())


def test_the_pack_is_chinese_in_chinese(browser: Any, server: Any) -> None:
    page = gui.new_page(browser)  # one that has no workflows to restore when it is opened again
    page.open(server.address)
    page.set("Comfy.Locale", "zh")
    try:
        page.open(server.address)
        page.load(template_path("magicmix_image_text" + DEMO))
        names = page.page.evaluate(
            "() => Object.values(window.LiteGraph.registered_node_types)"
            ".filter(t => (t.comfyClass ?? '').startsWith('Mixology'))"
            ".map(t => [t.comfyClass, t.title, ...t.category.split('/')])")
        assert len(names) >= 24
        assert not [words for words in names if not all(CHINESE.search(word) for word in words[1:])]
        page.set("Comfy.VueNodes.Enabled", False)
        assert "\u4e0e\u5176\u4ed6\u8282\u70b9\u5305\u4e00\u8d77\u4f7f\u7528" in page.read_help(
            "MixologyLayoutMixKSampler"), "no page beside other packs in Chinese"
        page.set("Comfy.VueNodes.Enabled", True)
        tooltips = page.read_tooltips("MixologyLayoutMixKSampler")
        assert len(tooltips) == 5 and not [text for text in tooltips if not CHINESE.search(text) or "Input:" in text]
    finally:
        page.set("Comfy.Locale", "en")
        page.page.close()
