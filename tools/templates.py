"""Writes `workflows/` and `subgraphs/`: run it in the tests' environment after a node's inputs changed.

    MIXOLOGY_HOST=... python tools/templates.py
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import blueprints
import templates_cocktail as cocktail
import templates_dual_style as dual_style
import templates_evaluate as evaluate
import templates_fusion as fusion
import templates_magicmix as magicmix
import templates_mixer as mixer
import templates_modern as modern
import templates_sweep as sweep
from graph import Graph, load_definitions
from titles import ALL, DEMO, template_path
from worlds import Demo, Real

BUILDERS: dict[str, Callable[[Graph, Real], list[str]]] = {
    "magicmix_image_text": magicmix.image_text, "magicmix_text_text": magicmix.text_text,
    "concept_removal": magicmix.concept_removal, "token_scale": magicmix.token_scale,
    "dual_style_epsilon": dual_style.epsilon, "dual_style_attention": dual_style.attention,
    "four_corners": dual_style.four_corners, "restyle_photo": dual_style.restyle,
    "cocktail_checkpoints": cocktail.checkpoints, "cocktail_lora": cocktail.lora, "cocktail_photo": cocktail.photo,
    "fusion_checkpoints": fusion.checkpoints, "fusion_cross_domain": fusion.cross_domain,
    "fusion_two_prompts": fusion.two_prompts, "fusion_three_experts": fusion.three_experts,
    "mixer_two_pictures": mixer.two_pictures, "mixer_picture_words": mixer.picture_words, "mixer_crops": mixer.crops,
    "metrics_two_merges": evaluate.two_merges, "sweep_grid": sweep.grid, "sweep_strip": sweep.strip}


def build(name: str, definitions: dict[str, Any], names: dict[str, str]) -> str:
    """A template's text by its short name."""
    graph = Graph(definitions, names)
    if name in modern.BUILDERS:
        make, family = modern.BUILDERS[name]
        return graph.render(make(graph, family))
    about = BUILDERS[name.removesuffix(DEMO)](graph, Demo() if name.endswith(DEMO) else Real())
    return graph.render(about)


def main() -> None:
    sys.path.insert(0, os.environ["MIXOLOGY_HOST"])
    from comfy.cli_args import args

    args.cpu = True
    loaded = load_definitions()
    for name in ALL:
        template_path(name).write_text(build(name, *loaded), encoding="utf-8")
    for name in blueprints.BLUEPRINTS:
        (blueprints.FOLDER / f"{name}.json").write_text(blueprints.render(name, *loaded), encoding="utf-8")


if __name__ == "__main__":
    main()
