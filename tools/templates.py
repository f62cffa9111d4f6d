"""Writes the templates of `workflows/`: run it in the tests' environment after a node's inputs changed.

    MIXOLOGY_HOST=... python tools/templates.py
"""
from __future__ import annotations

import os
import sys
from typing import Any

import templates_cocktail
import templates_fusion
import templates_mixer
from graph import ROOT, Graph, load_definitions
from template_parts import CHECKPOINT, add_picture, add_sampling

VAN_GOGH = "a Van Gogh painting of a village by the sea, bold swirling brushstrokes, vibrant colors"
PIXELS = "a Minecraft rendering of a village by the sea, pixelated textures, blocky cubes, sharp right angles"


def add_layout_picture(graph: Graph) -> tuple[int, int]:
    """A checkpoint, and a picture that is made a layout: the nodes of both."""
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    encode = add_picture(graph, "Layout picture", (0, 150), checkpoint, (380, 520))
    layout = graph.add("MixologyLayoutNoise", "Layout Noise", (380, 620), (300, 110), latent=(encode, 0))
    return checkpoint, layout


def image_text(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint, layout = add_layout_picture(graph)
    content = graph.add("CLIPTextEncode", "Content prompt", (380, 0), (400, 160), clip=(checkpoint, 1),
                        text="a photo of a corgi sitting in the grass")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 210), (400, 120), clip=(checkpoint, 1),
                         text="blurry, low quality")
    mix = graph.add("MixologyLayoutMixKSampler", "Layout Mix", (840, 0), (340, 420), model=(checkpoint, 0),
                    positive=(content, 0), negative=(negative, 0), layout=(layout, 0))
    decode = graph.add("VAEDecode", "VAE Decode", (1240, 0), (220, 50), samples=(mix, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1240, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/layout_mix")
    graph.note(
        "**MagicMix: the layout of a picture, the content of a prompt.**\n\n"
        "1. Choose a checkpoint and a layout picture, and say what it should become.\n"
        "2. **nu** decides: 0 keeps the picture, 1 is plain image to image. Alike things mix at 0.1 to 0.4, unlike "
        "ones at 0.5 to 0.9.\n"
        "3. A whole sweep in one run: write `0.1, 0.3, 0.5, 0.7, 0.9` into **nu_per_image**.\n\n"
        "SDXL: set Fit size to 1 megapixel.", (840, 480), (340, 260))
    return graph


def text_text(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512)
    layout_prompt = graph.add("CLIPTextEncode", "Layout prompt", (380, 0), (400, 120), clip=(checkpoint, 1),
                              text="a photo of a coffee machine on a table")
    content = graph.add("CLIPTextEncode", "Content prompt", (380, 170), (400, 120), clip=(checkpoint, 1),
                        text="a photo of a corgi")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 340), (400, 120), clip=(checkpoint, 1),
                         text="blurry, low quality")
    layout = graph.add("MixologyLayoutFromPrompt", "Layout from prompt", (840, 0), (320, 320), model=(checkpoint, 0),
                       positive=(layout_prompt, 0), negative=(negative, 0), latent=(size, 0), finish=True)
    mix = graph.add("MixologyLayoutMixKSampler", "Layout Mix", (1220, 0), (340, 420), model=(checkpoint, 0),
                    positive=(content, 0), negative=(negative, 0), layout=(layout, 0), nu=0.7)
    seen = graph.add("VAEDecode", "Decode layout", (840, 380), (220, 50), samples=(layout, 1), vae=(checkpoint, 2))
    graph.add("PreviewImage", "Layout", (840, 490), (320, 300), images=(seen, 0))
    decode = graph.add("VAEDecode", "VAE Decode", (1620, 0), (220, 50), samples=(mix, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1620, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/layout_mix")
    graph.note(
        "**MagicMix: the layout of one prompt, the content of another.**\n\n"
        "The layout prompt is sampled first and its states are recorded; the content prompt is then held to them. "
        "Keep **steps** and **scheduler** the same in both nodes.\n\n"
        "The layout's look depends on its seed: try some until you like it, then sweep **nu_per_image**. Switch "
        "**finish** off once you do not need to see the layout: it saves steps.\n\n"
        "SDXL: set Picture size to 1024 x 1024.", (0, 320), (320, 300))
    return graph


def token_scale(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512, batch_size=5)
    same = graph.add("LatentBatchSeedBehavior", "Same noise for all", (0, 310), (320, 60), samples=(size, 0),
                     seed_behavior="fixed")
    scale = graph.add("MixologyTokenScale", "Prompt with scales", (380, 0), (420, 340), model=(checkpoint, 0),
                      clip=(checkpoint, 1), text="a photo of a fluffy cat on a red sofa",
                      scales="fluffy = [-2, -1, 0, 1, 2]")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 400), (420, 120), clip=(checkpoint, 1),
                         text="blurry, low quality")
    sampler = graph.add("KSampler", "KSampler", (860, 0), (320, 270), model=(scale, 0), positive=(scale, 1),
                        negative=(negative, 0), latent_image=(same, 0), steps=30, cfg=7.5, sampler_name="ddim",
                        scheduler="ddim_uniform")
    decode = graph.add("VAEDecode", "VAE Decode", (1240, 0), (220, 50), samples=(sampler, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1240, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/token_scale")
    graph.note(
        "**Token attention scale: turn a word up, down, or into its absence.**\n\n"
        "1. Write the prompt, and below it one phrase a line with its value. 1 changes nothing, 0 hides the words, "
        "below 0 removes what they name, above 1 stresses it.\n"
        "2. A list gives each picture of the batch its own value: keep **batch_size** at the number of values. All "
        "start from the same noise, so that only the value differs.\n"
        "3. For one picture: `fluffy = 1.5` and batch_size 1. Add lines for more words.\n\n"
        "SDXL: set Picture size to 1024 x 1024.", (860, 330), (320, 330))
    return graph


def concept_removal(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint, layout = add_layout_picture(graph)
    scale = graph.add("MixologyTokenScale", "What to remove", (380, 0), (420, 300), model=(checkpoint, 0),
                      clip=(checkpoint, 1), text="a photo of a tiger", scales="tiger = -2")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 350), (420, 120), clip=(checkpoint, 1), text="")
    mix = graph.add("MixologyLayoutMixKSampler", "Layout Mix", (860, 0), (340, 420), model=(scale, 0),
                    positive=(scale, 1), negative=(negative, 0), layout=(layout, 0), nu=0.9)
    decode = graph.add("VAEDecode", "VAE Decode", (1260, 0), (220, 50), samples=(mix, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1260, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/concept_removal")
    graph.note(
        "**MagicMix: take a concept out of a picture and keep its layout.**\n\n"
        "1. Choose a checkpoint and a picture, and write a prompt that **names what the picture shows**.\n"
        "2. Below it, give the word a negative value: the picture's layout then fills with something else.\n"
        "3. **nu** near 1 lets go of the old content; lower it to stay closer to the picture. **k_max** higher allows "
        "larger changes.\n\n"
        "SDXL: set Fit size to 1 megapixel.", (860, 480), (340, 280))
    return graph


def dual_style_epsilon(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512)
    masks = graph.add("MixologyGradientMask", "Who paints where", (0, 310), (320, 220), profile="logistic")
    left = graph.add("CLIPTextEncode", "Left style", (380, 0), (400, 140), clip=(checkpoint, 1), text=VAN_GOGH)
    right = graph.add("CLIPTextEncode", "Right style", (380, 190), (400, 140), clip=(checkpoint, 1), text=PIXELS)
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 380), (400, 100), clip=(checkpoint, 1),
                         text="blurry, low quality")
    guider = graph.add("MixologyEpsilonMergeGuider", "Merge", (840, 0), (320, 190), model=(checkpoint, 0),
                       masks=(masks, 0), positives=[(left, 0), (right, 0)], negative=(negative, 0))
    add_sampling(graph, (840, 250), checkpoint, guider, (size, 0), "mixology/dual_style")
    graph.note(
        "**Dual style: two prompts share one picture, without a seam.**\n\n"
        "1. Write a prompt for the left and one for the right. Keep what they show the same, and let only the style "
        "differ.\n"
        "2. **Who paints where** says which prompt has which part: logistic keeps both sides pure with a short "
        "transition, linear blends all the way. **angle** 90 goes from top to bottom.\n"
        "3. More styles: raise **parts**, and connect as many prompts to the guider. Painted masks, joined by Batch "
        "Masks, work too.\n"
        "4. **cfg_per_style** such as `5, 9` helps a style that the other one drowns.\n\n"
        "SDXL: set Picture size to 1024 x 1024.", (0, 580), (400, 380))
    return graph


def dual_style_attention(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512)
    masks = graph.add("MixologyGradientMask", "Who paints where", (0, 310), (320, 220), profile="logistic",
                      sharpness=30.0)
    left = graph.add("CLIPTextEncode", "Left style", (380, 0), (400, 140), clip=(checkpoint, 1), text=VAN_GOGH)
    right = graph.add("CLIPTextEncode", "Right style", (380, 190), (400, 140), clip=(checkpoint, 1), text=PIXELS)
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 380), (400, 100), clip=(checkpoint, 1),
                         text="blurry, low quality")
    merge = graph.add("MixologyAttentionMerge", "Merge", (840, 0), (320, 130), model=(checkpoint, 0), masks=(masks, 0),
                      conditionings=[(left, 0), (right, 0)])
    sampler = graph.add("KSampler", "KSampler", (840, 190), (320, 270), model=(merge, 0), positive=(merge, 1),
                        negative=(negative, 0), latent_image=(size, 0), steps=30, cfg=10.0, sampler_name="ddim",
                        scheduler="ddim_uniform")
    decode = graph.add("VAEDecode", "VAE Decode", (1220, 0), (220, 50), samples=(sampler, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (1220, 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/dual_style")
    graph.note(
        "**Dual style by attention: two prompts in one model evaluation.**\n\n"
        "1. Write a prompt for the left and one for the right. Keep what they show the same, and let only the style "
        "differ.\n"
        "2. It costs hardly more than one prompt and keeps the picture of a piece, but one style may take over: a "
        "higher **cfg** and **sharpness** help against that, and so does another seed. Merging predictions (template "
        "dual_style_epsilon) keeps styles apart more surely.\n"
        "3. More styles: raise **parts**, and connect as many prompts.\n\n"
        "For SD1.x, SD2.x and SDXL. SDXL: set Picture size to 1024 x 1024.", (0, 580), (400, 340))
    return graph


def four_corners(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512)
    masks = graph.add("MixologyGradientMask", "Who paints where", (0, 310), (320, 220), profile="logistic", rows=2)
    corners = [
        graph.add("CLIPTextEncode", title, (380, 170 * index), (400, 120), clip=(checkpoint, 1),
                  text=f"a tree on a hill, {season}")
        for index, (title, season) in enumerate((
            ("Top left", "spring, pink blossoms"), ("Top right", "summer, lush green leaves"),
            ("Bottom left", "autumn, golden leaves"), ("Bottom right", "winter, bare branches in the snow")))]
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 680), (400, 100), clip=(checkpoint, 1),
                         text="blurry, low quality")
    guider = graph.add("MixologyEpsilonMergeGuider", "Merge", (840, 0), (320, 230), model=(checkpoint, 0),
                       masks=(masks, 0), positives=[(corner, 0) for corner in corners], negative=(negative, 0))
    add_sampling(graph, (840, 290), checkpoint, guider, (size, 0), "mixology/four_corners")
    graph.note(
        "**Four corners: four prompts share one picture.**\n\n"
        "1. Write what each corner shows. Whatever all prompts share holds the picture together.\n"
        "2. **parts** counts the styles from left to right, **rows** those from top to bottom; connect the prompts row "
        "by row, up to 16. A higher **sharpness** makes the transitions shorter.\n\n"
        "A step costs one evaluation for each prompt and one for the negative. SDXL: set Picture size to 1024 x 1024.",
        (0, 580), (340, 300))
    return graph


def restyle_photo(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    encode = add_picture(graph, "Picture", (0, 150), checkpoint, (0, 680))
    source = graph.add("CLIPTextEncode", "What the picture shows", (380, 0), (400, 120), clip=(checkpoint, 1),
                       text="a drawing of a girl in a pink dress on a green hill")
    target = graph.add("CLIPTextEncode", "What it shall become", (380, 170), (400, 140), clip=(checkpoint, 1),
                       text="a Van Gogh painting of a girl in a pink dress on a green hill, swirling brushstrokes")
    negative = graph.add("CLIPTextEncode", "Negative prompt", (380, 360), (400, 100), clip=(checkpoint, 1), text="")
    guider = graph.add("CFGGuider", "Target", (840, 0), (320, 110), model=(checkpoint, 0), positive=(target, 0),
                       negative=(negative, 0), cfg=5.0)
    cycle = graph.add("MixologyCycleSampler", "Cycle", (380, 510), (320, 160), conditioning=(source, 0))
    add_sampling(graph, (840, 170), checkpoint, guider, (encode, 0), "mixology/restyle", sampler=cycle, steps=50,
                 denoise=0.8)
    graph.note(
        "**CycleDiffusion: a picture in another style, with all else kept.**\n\n"
        "1. Choose a picture, say what it shows, and say the same again in the style that it shall have. Only the "
        "difference between the two prompts changes the picture.\n"
        "2. **denoise** and **cfg** decide how far it goes: too faint, raise them; too much lost, lower them.\n"
        "3. Two styles in one picture: put the Epsilon Merge Guider in the place of Target (template "
        "dual_style_epsilon shows how).\n\n"
        "SDXL: set Fit size to 1 megapixel.", (0, 800), (400, 320))
    return graph


TEMPLATES = {"magicmix_image_text": image_text, "magicmix_text_text": text_text, "token_scale": token_scale,
             "concept_removal": concept_removal, "dual_style_epsilon": dual_style_epsilon,
             "dual_style_attention": dual_style_attention, "four_corners": four_corners,
             "restyle_photo": restyle_photo, **templates_cocktail.TEMPLATES,
             **templates_fusion.TEMPLATES, **templates_mixer.TEMPLATES}


def main() -> None:
    sys.path.insert(0, os.environ["MIXOLOGY_HOST"])
    from comfy.cli_args import args

    args.cpu = True
    definitions = load_definitions()
    for name, build in TEMPLATES.items():
        (ROOT / "workflows" / f"{name}.json").write_text(build(definitions).render(), encoding="utf-8")


if __name__ == "__main__":
    main()
