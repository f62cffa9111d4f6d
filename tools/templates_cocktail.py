"""The templates of Diffusion Cocktail."""
from __future__ import annotations

from typing import Any

from graph import Graph, Link
from template_parts import CHECKPOINT, Place, add_picture

OTHER = "dreamshaper_8.safetensors"
LORA = "your_style_lora.safetensors"
NEGATIVE = "worst quality, blurry"


def add_inversion(graph: Graph, at: Place, model: Link, clip: Link, text: str, latent: Link) -> int:
    """The picture's way back to noise, read with what it shows."""
    x, y = at
    shown = graph.add("CLIPTextEncode", "What the picture shows", (x, y), (400, 120), clip=clip, text=text)
    unwanted = graph.add("CLIPTextEncode", "What it does not show", (x, y + 170), (400, 100), clip=clip, text=NEGATIVE)
    blend = graph.add("MixologyBlendPrompts", "Blend Prompts", (x, y + 320), (300, 110), positive=(shown, 0),
                      negative=(unwanted, 0))
    return graph.add("MixologyInvert", "Invert", (x, y + 480), (300, 190), model=model, conditioning=(blend, 0),
                     latent=latent)


def add_cocktail(graph: Graph, at: Place, model: Link, clip: Link, vae: Link, text: str, inversion: int) -> None:
    """Sampling with the target model along the trajectory, to the saved picture."""
    x, y = at
    empty = graph.add("CLIPTextEncode", "Empty prompt", (x, y), (400, 80), clip=clip, text="")
    positive = graph.add("CLIPTextEncode", "What it shall become", (x, y + 130), (400, 140), clip=clip, text=text)
    negative = graph.add("CLIPTextEncode", "Negative prompt", (x, y + 320), (400, 100), clip=clip, text=NEGATIVE)
    mix = graph.add("MixologyCocktailKSampler", "Cocktail", (x + 460, y), (320, 250), model=model,
                    trajectory=(inversion, 0), source_conditioning=(empty, 0), positive=(positive, 0),
                    negative=(negative, 0))
    decode = graph.add("VAEDecode", "VAE Decode", (x + 840, y), (220, 50), samples=(mix, 0), vae=vae)
    graph.add("SaveImage", "Save Image", (x + 840, y + 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/cocktail")


def add_source(graph: Graph, checkpoint: int, text: str) -> int:
    """A picture that the source model paints: the sampler's node."""
    size = graph.add("EmptyLatentImage", "Picture size", (0, 150), (320, 110), width=512, height=512)
    prompt = graph.add("CLIPTextEncode", "Source prompt", (0, 310), (320, 120), clip=(checkpoint, 1), text=text)
    negative = graph.add("CLIPTextEncode", "Source negative", (0, 480), (320, 100), clip=(checkpoint, 1),
                         text=NEGATIVE)
    sampler = graph.add("KSampler", "Source", (0, 630), (320, 270), model=(checkpoint, 0), positive=(prompt, 0),
                        negative=(negative, 0), latent_image=(size, 0), steps=30, cfg=7.5, sampler_name="ddim",
                        scheduler="ddim_uniform")
    seen = graph.add("VAEDecode", "Decode source", (380, 730), (220, 50), samples=(sampler, 0), vae=(checkpoint, 2))
    graph.add("PreviewImage", "Source picture", (380, 830), (320, 300), images=(seen, 0))
    return sampler


def cocktail_checkpoints(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    source = graph.add("CheckpointLoaderSimple", "Source checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    target = graph.add("CheckpointLoaderSimple", "Target checkpoint", (840, 0), (320, 100), ckpt_name=OTHER)
    text = "a photo of a lighthouse on a cliff by the sea"
    sampler = add_source(graph, source, text)
    inversion = add_inversion(graph, (380, 0), (source, 0), (source, 1), text, (sampler, 0))
    add_cocktail(graph, (840, 150), (target, 0), (target, 1), (target, 2), "a lighthouse on a cliff by the sea",
                 inversion)
    graph.note(
        "**Diffusion Cocktail: the content of one model, the style of another.**\n\n"
        "1. The source checkpoint paints a picture. **Invert** follows it back to noise.\n"
        "2. **Cocktail** starts from that noise with the target checkpoint. The way of the source picture is read "
        "again at each step and lends its attention and features, so that its structure stays.\n"
        "3. **attention_until** and **features_until** higher: more structure; lower: more of the target's own. A "
        "higher **cfg** changes more of the look.\n\n"
        "Both checkpoints must be of one family (two SD1.x, or two SDXL). SDXL: set Picture size to 1024 x 1024.",
        (840, 760), (400, 360))
    return graph


def cocktail_lora(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    source = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    lora = graph.add("LoraLoader", "Style LoRA", (840, 0), (320, 130), model=(source, 0), clip=(source, 1),
                     lora_name=LORA, strength_model=0.7, strength_clip=0.7)
    text = "a photo of a lighthouse on a cliff by the sea"
    sampler = add_source(graph, source, text)
    inversion = add_inversion(graph, (380, 0), (source, 0), (source, 1), text, (sampler, 0))
    add_cocktail(graph, (840, 180), (lora, 0), (lora, 1), (source, 2), "a lighthouse on a cliff by the sea", inversion)
    graph.note(
        "**Diffusion Cocktail with a LoRA: the same picture in the LoRA's style.**\n\n"
        "1. The checkpoint paints a picture, and **Invert** follows it back to noise without the LoRA.\n"
        "2. **Cocktail** paints it anew with the LoRA. Add the LoRA's trigger words to *What it shall become*, and "
        "they help in *What the picture shows* too.\n"
        "3. The LoRA's **strength** and **cfg** decide how far the style goes; **attention_until** and "
        "**features_until** how much of the structure stays.\n\n"
        "SDXL: set Picture size to 1024 x 1024.", (840, 790), (400, 320))
    return graph


def cocktail_photo(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=CHECKPOINT)
    encode = add_picture(graph, "Picture", (0, 150), checkpoint, (0, 690))
    inversion = add_inversion(graph, (380, 0), (checkpoint, 0), (checkpoint, 1),
                              "a drawing of a girl in a pink dress on a green hill", (encode, 0))
    add_cocktail(graph, (840, 0), (checkpoint, 0), (checkpoint, 1), (checkpoint, 2),
                 "a watercolor painting of a girl in a pink dress on a green hill", inversion)
    graph.note(
        "**Diffusion Cocktail: a photo in another style, its structure kept.**\n\n"
        "1. Choose a picture and say what it shows. **Invert** follows it back to noise.\n"
        "2. Say what it shall become. A **style checkpoint or LoRA** for Cocktail's model does more than words: load "
        "it beside this one, with its own CLIP for the three prompts on the right.\n"
        "3. **Save Trajectory** keeps an inversion for later: painting it again skips that part.\n\n"
        "SDXL: set Fit size to 1 megapixel.", (840, 480), (400, 300))
    return graph


TEMPLATES = {"cocktail_checkpoints": cocktail_checkpoints, "cocktail_lora": cocktail_lora,
             "cocktail_photo": cocktail_photo}
