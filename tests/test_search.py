"""What people type finds the node they need first, and what nodes show of their inputs: labels, and what is rare."""
from __future__ import annotations

import math
import re
from typing import Any

import pytest
from mixology.nodes.search import CHINESE, WORDS, search_words

pytestmark = pytest.mark.seam

FIRST = {
    "magicmix": "LayoutMixKSampler", "semantic mixing": "LayoutMixKSampler", "keep composition": "LayoutMixKSampler",
    "img2img": "LayoutMixKSampler", "cocktail": "CocktailKSampler", "diffusion cocktail": "CocktailKSampler",
    "ditail": "CocktailKSampler", "style transfer": "CocktailKSampler", "structure transfer": "CocktailKSampler",
    "cyclediffusion": "CycleSampler", "cycle diffusion": "CycleSampler", "dual style": "EpsilonMergeGuider",
    "two styles": "EpsilonMergeGuider", "regional prompt": "EpsilonMergeGuider", "magicfusion": "SaliencyGuider",
    "mix models": "SaliencyGuider", "blend models": "SaliencyGuider", "merge models": "SaliencyGuider",
    "ensemble": "SaliencyGuider", "image mixer": "MixerImage", "combine images": "MixerImage",
    "mix images": "MixerImage", "ip-adapter": "MixerImage", "ipadapter": "MixerImage", "redux": "MixerImage",
    "negpip": "TokenScale", "token weight": "TokenScale", "remove object": "TokenScale", "erase": "TokenScale",
    "unsampler": "Invert", "ssim": "ImageMetrics", "psnr": "ImageMetrics", "lpips": "ImageMetrics",
    "compare images": "ImageMetrics", "xy plot": "Sweep", "contact sheet": "LabelledGrid", "clip score": "ClipMetrics",
    "\u98ce\u683c\u8fc1\u79fb": "CocktailKSampler",  # style transfer
    "\u9e21\u5c3e\u9152": "CocktailKSampler",  # cocktail
    "\u4fdd\u6301\u6784\u56fe": "LayoutMixKSampler",  # keep the composition
    "\u56fe\u751f\u56fe": "LayoutMixKSampler",  # image to image
    "\u5faa\u73af\u6269\u6563": "CycleSampler",  # cycle diffusion
    "\u56fe\u50cf\u6df7\u5408": "MixerImage",  # mix images
    "\u79fb\u9664\u7269\u4f53": "TokenScale"}  # remove an object
ADVANCED = {
    "LayoutMixSampler": {"variant"}, "LayoutMixKSampler": {"variant"}, "TokenScale": {"start_percent", "end_percent"},
    "EpsilonMergeGuider": {"cfg_per_style"}, "CycleSampler": {"source_cfg"}, "Invert": {"rule"},
    "SaliencyGuider": {"start_percent", "outside", "saliency_uncond"}, "ClipMetrics": {"fit"},
    "Sweep": {"values_3"}}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
WIDEST = 22  # letters of a label that a fresh node of Nodes 2.0 has room for
FARTHEST = 30  # letters before a part of the query, beyond which the front end no longer finds it


@pytest.fixture(scope="module")
def told(pack: dict[str, Any]) -> dict[str, Any]:
    """What the front end is told of each node, by id."""
    return {name: node.GET_NODE_INFO_V1() for name, node in pack.items()}


def options_of(info: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Type and options of each input by its id."""
    groups = [info["input"].get(kind, {}) for kind in ("required", "optional")]
    return {name: (spec[0] if isinstance(spec[0], str) else "COMBO", spec[1] if len(spec) > 1 else {})
            for group in groups for name, spec in group.items()}


def distance(query: str, text: str) -> float | None:
    """How ill a text fits a query, from 0; None where a part of the query is not in it."""
    places = [text.find(part) for part in query.split()]
    if not all(0 <= place <= FARTHEST for place in places):
        return None
    fits = [0.0 if text == query else max(0.001, place / 100) for place in places]
    return max(2.0 ** -52, sum(fits) / len(fits)) ** (1 / math.sqrt(len(text.split())))


def place_of_name(query: str, text: str) -> tuple[float, ...]:
    """How a query stands in a name: class, two lengths, and a penalty for what the name has more than the query."""
    words = [word.lower() for word in re.split(r" |\b|(?<=[a-z])(?=[A-Z])|(?=[A-Z][a-z])", text) if word]
    text, parts = text.lower(), query.split()
    found = [text.find(part) for part in parts]
    half, extra = len(text) / 2, 0.2 * (1 - min(len(text), len(query)) / max(len(text), len(query)))
    if text == query:
        return 0, 0, 0, extra
    if text.startswith(query):
        return 1, 0, len(text), extra
    if query in text:
        return 2 if query in words else 3, text.find(query) + half, len(text), extra
    if all(part in words for part in parts):
        ends = [words.index(part) for part in parts]
        return 4, max(ends) - min(ends) + max(ends) / 2 + half, len(text), extra
    if min(found) >= 0:
        end = max(place + len(part) for place, part in zip(found, parts))
        return 5, end - min(found) + end / 2 + half, len(text), extra
    return 9, 0, 0, extra


def rank(query: str, told: dict[str, Any]) -> list[str]:
    """Ids in the order of the front end's search box, spelling mistakes aside.

    By where the query stands in the node's names; where in none of them, by how well its words fit and how little
    longer than the query its shorter name is. Of the host's own nodes those that are used much come before.
    """
    order = []
    for name, info in told.items():
        names = (name, info["display_name"])
        fits = [fit for text in (*names, *info["search_aliases"])
                if (fit := distance(query, text.lower())) is not None]
        if fits:
            *place, extra = min(place_of_name(query, text) for text in names)
            order.append(([*place, extra + math.prod(fits)], name))
    return [name for _, name in sorted(order, key=lambda pair: pair[0])]


def test_every_node_has_words_of_both_languages(told: dict[str, Any]) -> None:
    assert set(WORDS) == set(CHINESE) == set(told)
    for name, info in told.items():
        assert info["search_aliases"] == search_words(name) and WORDS[name] and CHINESE[name]
        assert len(set(search_words(name))) == len(search_words(name)), f"{name} has a word twice"
        assert all(word == word.lower() == word.strip() for word in WORDS[name]), name


@pytest.mark.parametrize("query", FIRST)
def test_a_search_brings_the_node_to_begin_with(query: str, told: dict[str, Any]) -> None:
    assert rank(query, told)[:1] == [f"Mixology{FIRST[query]}"]


def test_a_papers_name_brings_all_its_nodes(told: dict[str, Any]) -> None:
    for query, category in (("magicmix", "layout"), ("ditail", "cocktail"), ("magicfusion", "fusion"),
                            ("image mixer", "mixer")):
        found = set(rank(query, told))
        assert found >= {name for name, info in told.items() if info["category"] == f"mixology/{category}"}, query
    assert set(rank("dual style", told)) == {
        f"Mixology{name}" for name in ("AttentionMerge", "EpsilonMergeGuider", "GradientMask")}


def test_rare_inputs_and_no_others_are_advanced(told: dict[str, Any]) -> None:
    for name, info in told.items():
        rare = {key for key, (_, options) in options_of(info).items() if options.get("advanced")}
        assert rare == ADVANCED.get(name.removeprefix("Mixology"), set()), name


def test_labels_begin_with_what_messages_call_an_input(told: dict[str, Any]) -> None:
    """And sockets have none: the front end would show it in every language, and save it in workflows."""
    count = 0
    for name, info in told.items():
        for key, (kind, options) in options_of(info).items():
            label = options.get("display_name")
            if label is not None:
                count += 1
                assert kind in WIDGETS and label.startswith(f"{key} (") and len(label) <= WIDEST, (name, key)
    assert count > 20
