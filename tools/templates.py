"""Writes the templates of `workflows/`: run it in the tests' environment after a node's inputs changed.

    MIXOLOGY_HOST=... python tools/templates.py
"""
from __future__ import annotations

import os
import sys
from typing import Any

from graph import Graph, load_definitions

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


def image_text(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    picture = graph.add("LoadImage", "Layout picture", (0, 150), (320, 320), image="example.png")
    fit = graph.add("ImageScaleToTotalPixels", "Fit size", (0, 520), (320, 110), image=(picture, 0),
                    upscale_method="area", megapixels=0.25, resolution_steps=8)
    encode = graph.add("VAEEncode", "VAE Encode", (380, 520), (220, 50), pixels=(fit, 0), vae=(checkpoint, 2))
    layout = graph.add("MixologyLayoutNoise", "Layout Noise", (380, 620), (300, 110), latent=(encode, 0))
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
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    picture = graph.add("LoadImage", "Layout picture", (0, 150), (320, 320), image="example.png")
    fit = graph.add("ImageScaleToTotalPixels", "Fit size", (0, 520), (320, 110), image=(picture, 0),
                    upscale_method="area", megapixels=0.25, resolution_steps=8)
    encode = graph.add("VAEEncode", "VAE Encode", (380, 520), (220, 50), pixels=(fit, 0), vae=(checkpoint, 2))
    layout = graph.add("MixologyLayoutNoise", "Layout Noise", (380, 620), (300, 110), latent=(encode, 0))
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


TEMPLATES = {"magicmix_image_text": image_text, "magicmix_text_text": text_text, "token_scale": token_scale,
             "concept_removal": concept_removal}


def main() -> None:
    sys.path.insert(0, os.environ["MIXOLOGY_HOST"])
    from comfy.cli_args import args

    args.cpu = True
    definitions = load_definitions()
    for name, build in TEMPLATES.items():
        build(definitions).write(name)


if __name__ == "__main__":
    main()
