"""The templates of Image Mixer."""
from __future__ import annotations

from typing import Any

from graph import Graph, Link
from template_parts import Place

MIXER = "image-mixer-pruned.ckpt"
VIT_L = "clip-vit-large-patch14.safetensors"  # both towers in one file
NEEDS = (
    "It needs a model that was trained on image embeddings, such as **image-mixer-pruned.ckpt** "
    "(lambdalabs/image-mixer on Hugging Face), and **CLIP ViT-L/14** (openai/clip-vit-large-patch14; a copy in "
    "models/clip_vision and, for texts, one in models/text_encoders). The checkpoint's CLIP output stays unconnected."
    "\n\nImage Variations checkpoints: **slots** 1 and 512 x 512. Without a download: *Demo Checkpoint*, name mixer, "
    "in place of all loaders, and 128 x 128.")


def add_loaders(graph: Graph, text: bool = False) -> tuple[int, int, int]:
    """The checkpoint and CLIP's two towers: their nodes; the text tower only if `text`."""
    checkpoint = graph.add("CheckpointLoaderSimple", "Load Checkpoint", (0, 0), (320, 100), ckpt_name=MIXER)
    vision = graph.add("CLIPVisionLoader", "Load CLIP Vision", (0, 150), (320, 60), clip_name=VIT_L)
    clip = graph.add("CLIPLoader", "Load CLIP", (0, 260), (320, 110), clip_name=VIT_L) if text else 0
    return checkpoint, vision, clip


def add_image(graph: Graph, title: str, at: Place, vision: int, picture: int, before: Link | None, **settings: float,
              ) -> Link:
    """A picture, or a crop of it, after the sources before it."""
    wires = {} if before is None else {"mixer": before}
    return graph.add("MixologyMixerImage", title, at, (300, 190), clip_vision=(vision, 0), image=(picture, 0), **wires,
                     **settings), 0


def add_mix(graph: Graph, at: Place, checkpoint: int, mixer: Link) -> None:
    """The mix's conditioning, sampling and the saved picture."""
    x, y = at
    size = graph.add("EmptyLatentImage", "Picture size", (x, y + 190), (320, 110), width=640, height=640)
    mix = graph.add("MixologyMixerConditioning", "Mix", (x, y), (320, 130), mixer=mixer, model=(checkpoint, 0))
    sampler = graph.add("KSampler", "KSampler", (x + 380, y), (320, 270), model=(checkpoint, 0), positive=(mix, 0),
                        negative=(mix, 1), latent_image=(size, 0), steps=30, cfg=3.0, sampler_name="ddim",
                        scheduler="ddim_uniform")
    decode = graph.add("VAEDecode", "VAE Decode", (x + 760, y), (220, 50), samples=(sampler, 0), vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (x + 760, y + 110), (400, 420), images=(decode, 0),
              filename_prefix="mixology/mixer")


def mixer_two_pictures(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint, vision, _ = add_loaders(graph)
    mixer: Link | None = None
    for row, title in enumerate(("First", "Second")):
        picture = graph.add("LoadImage", f"{title} picture", (380 * row, 270), (320, 320), image="example.png")
        mixer = add_image(graph, title, (380 + 360 * row, 0), vision, picture, mixer)
    assert mixer is not None
    add_mix(graph, (1100, 0), checkpoint, mixer)
    graph.note(
        "**Image Mixer: two pictures become one.**\n\n"
        "1. Choose two pictures. Each becomes one token that the model attends to, as a prompt's words are.\n"
        "2. **strength** of a picture, by a tenth at a time: raise it for the one that gets lost.\n"
        "3. **mode** concat keeps both apart, so that one may give the thing and the other the ground; average blends "
        "them into one.\n"
        "4. More pictures: put another Mixer Image between. KSampler wants **cfg 3** and both outputs of Mix.\n\n"
        + NEEDS, (1100, 360), (700, 360))
    return graph


def mixer_picture_words(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint, vision, clip = add_loaders(graph, text=True)
    picture = graph.add("LoadImage", "Picture", (0, 420), (320, 320), image="example.png")
    image = add_image(graph, "The picture", (380, 0), vision, picture, None)
    words = graph.add("MixologyMixerText", "The words", (740, 0), (320, 190), clip=(clip, 0), text="a snowy forest",
                      strength=1.4, mixer=image)
    add_mix(graph, (1120, 0), checkpoint, (words, 0))
    graph.note(
        "**Image Mixer: a picture and words.**\n\n"
        "1. Choose a picture and say what shall join it. CLIP puts pictures and texts into one space, so words are one "
        "more token; short ones work best.\n"
        "2. Words are weaker than pictures: **strength** 1.4 to 1.5.\n"
        "3. To change what the picture shows, take a direction: two Mixer Text nodes, what it shall become with "
        "strength +0.5 and what it is with -0.5, and **mode** sum.\n\n"
        "CLIP must come from Load CLIP: the checkpoints' own text encoders lack the projection.\n\n"
        + NEEDS, (1120, 360), (700, 380))
    return graph


def mixer_crops(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    checkpoint, vision, _ = add_loaders(graph)
    picture = graph.add("LoadImage", "Picture", (0, 270), (320, 320), image="example.png")
    mixer: Link | None = None
    for index, (title, x, y, side) in enumerate((
            ("The middle", 0.2, 0.2, 0.6), ("Left half", 0.0, 0.25, 0.5), ("Right half", 0.5, 0.25, 0.5),
            ("The ground", 0.0, 0.7, 0.3))):
        at = (380 + 360 * (index % 2), 240 * (index // 2))
        mixer = add_image(graph, title, at, vision, picture, mixer, x=x, y=y, width=side, height=side)
    assert mixer is not None
    add_mix(graph, (1100, 0), checkpoint, mixer)
    graph.note(
        "**Image Mixer: crops of one picture.**\n\n"
        "1. Choose a picture. Each node sees the part that **x**, **y**, **width** and **height** cut out, as "
        "fractions of the picture.\n"
        "2. Only what the crops show comes through, newly composed. Take a node out of the chain, or set its "
        "**strength** to 0, to leave its part out; connect another picture to one of them to exchange that part.\n"
        "3. Up to five sources: the model was trained on five crops of a picture.\n\n"
        + NEEDS, (1100, 360), (700, 340))
    return graph


TEMPLATES = {"mixer_two_pictures": mixer_two_pictures, "mixer_picture_words": mixer_picture_words,
             "mixer_crops": mixer_crops}
