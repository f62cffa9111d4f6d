"""The techniques on the model families that come as separate files."""
from __future__ import annotations

from collections.abc import Callable

from graph import Graph
from modern import FLUX, KLEIN, QWEN, Z_IMAGE, Modern, fit, guide, load, sample, say_negative, size
from worlds import save, say_text

INVERSION_STEPS = 28  # each way; an inversion comes the nearer to its picture the more there are


def unread(family: Modern) -> str:
    """What a note says of the negative prompt."""
    return "The negative prompt is not read at cfg 1. " if family.cfg == 1 else ""


def token_scale(graph: Graph, family: Modern) -> list[str]:
    with graph.group("Model", 300):
        model = load(graph, family)
    with graph.group("Three pictures"):
        latent = size(graph, family, 3)
        same = graph.add("LatentBatchSeedBehavior", samples=latent, seed_behavior="fixed")
    with graph.group("Prompt with scales", below=True):
        scale = graph.add("MixologyTokenScale", change=True, model=model.model, clip=model.clip,
                          text="a photo of a fluffy cat on a red sofa", scales="fluffy = [-1, 1, 2]")
        negative = say_negative(graph, family, model)
    with graph.group("Sample", 300):
        sampled = sample(graph, family, (scale, 0), (scale, 1), negative, (same, 0))
    with graph.group("Pictures", 400):
        save(graph, sampled, model, "token_scale")
    return [f"**Token attention scale on {family.name}: turn a word up, down, or into its absence.** Three pictures "
            "from the same noise, each with its own value for one word. It acts in the attention: values below 0 work "
            f"at this model's cfg 1 and {family.steps} steps, where a negative prompt does nothing.",
            "Change: the prompt, and below it one phrase a line with its value: 1 changes nothing, 0 hides the words, "
            "below 0 removes what they name, above 1 stresses it. For one picture write one number and set batch_size "
            "to 1.", family.files]


def layout(graph: Graph, family: Modern) -> list[str]:
    few = family.steps < 10
    with graph.group("Model", 300):
        model = load(graph, family)
    with graph.group("The picture becomes a layout"):
        picture = graph.add("LoadImage", "Layout picture", change=True, image="example.png"), 0
        latent = fit(graph, family, picture, model)
        noise = graph.add("MixologyLayoutNoise", latent=latent)
    with graph.group("What it becomes", 320):
        content = guide(graph, family, say_text(graph, "Content prompt", model,
                                                "a photo of a corgi sitting in the grass, soft evening light"))
        negative = say_negative(graph, family, model)
    with graph.group("Mix", 300):
        mix = graph.add("MixologyLayoutMixKSampler", change=True, model=model.model, positive=content,
                        negative=negative, layout=(noise, 0), steps=family.steps, cfg=family.cfg,
                        sampler_name=family.sampler, scheduler="simple", k_max=0.75 if few else 0.6,
                        k_min=0.25 if few else 0.3)
    with graph.group("Picture"):
        save(graph, (mix, 0), model, "layout_mix")
    return [f"**MagicMix on {family.name}: the layout of a picture, the content of a prompt.** The first steps follow "
            "the picture, the last ones the prompt.",
            "Change: the picture, the content prompt, and **nu**: 0 keeps the picture, 1 is plain image to image; "
            "alike things mix at 0.1 to 0.4, unlike ones at 0.5 to 0.9. **k_max** and **k_min** say between which "
            "amounts of noise they mix" + (", wider than usual here, as eight steps are few. " if few else ". ")
            + "**nu_per_image** (0.1, 0.3, 0.5) is a whole sweep in one run.", unread(family) + family.files]


def cocktail(graph: Graph, family: Modern) -> list[str]:
    with graph.group("Model", 300):
        model = load(graph, family)
    with graph.group("Picture"):
        picture = graph.add("LoadImage", "Picture", change=True, image="example.png"), 0
        latent = fit(graph, family, picture, model)
    with graph.group("Its way back to noise", 310):
        shown = guide(graph, family, say_text(graph, "What the picture shows", model,
                                              "a drawing of a girl in a pink dress on a green hill"), "Way back", 1.0)
        trajectory = graph.add("MixologyInvert", model=model.model, conditioning=shown, latent=latent,
                               steps=INVERSION_STEPS, scheduler="simple"), 0
    with graph.group("What it becomes", 300):
        become = guide(graph, family, say_text(graph, "What it shall become", model,
                                               "a watercolor painting of a girl in a pink dress on a green hill"))
        negative = say_negative(graph, family, model)
    with graph.group("Repaint along that way", 300):
        mix = graph.add("MixologyCocktailKSampler", change=True, model=model.model, trajectory=trajectory,
                        source_conditioning=shown, positive=become, negative=negative, cfg=family.cfg)
        save(graph, (mix, 0), model, "cocktail")
    return [f"**Diffusion Cocktail on {family.name}: a photo in another style, its structure kept.** DDIM Inversion "
            "follows the picture back to noise without guidance (1); KSampler (Cocktail) paints it anew along the same "
            "way, and the picture's own attention holds the structure.",
            "Change: the picture, what it shows and what it shall become; **guidance** of the second prompt for more "
            "of it. **attention_until** higher: more structure; lower: more of the new prompt. A LoRA behind the model "
            "loader, only for repainting, does more than words.", unread(family) + family.files]


def regions(graph: Graph, family: Modern) -> list[str]:
    with graph.group("Model", 300):
        model = load(graph, family)
    with graph.group("Size"):
        latent = size(graph, family)
    with graph.group("Who paints where", below=True):
        masks = graph.add("MixologyGradientMask", change=True, width=family.side, height=family.side,
                          profile="logistic", sharpness=30.0)
    with graph.group("A prompt for each region", 320):
        left = say_text(graph, "Left", model, "a village by the sea in deep winter, snow on the roofs, blue evening "
                                              "light, warm windows")
        right = say_text(graph, "Right", model, "a village by the sea in high summer, flowers at every door, golden "
                                                "morning light")
        negative = say_negative(graph, family, model)
    with graph.group("Merge and sample", 300):
        merge = graph.add("MixologyAttentionMerge", model=model.model, masks=(masks, 0), conditionings=[left, right])
        positive = guide(graph, family, (merge, 1))
        sampled = sample(graph, family, (merge, 0), positive, negative, latent)
    with graph.group("Picture"):
        save(graph, sampled, model, "regions")
    return [f"**Regional prompts on {family.name}: two prompts share one picture, in one evaluation.** Each region's "
            "attention reads its own prompt only, and all of them see the whole picture, so that it stays of a piece.",
            "Change: both prompts; what they share holds the picture together. Gradient Masks: **angle** 90 goes from "
            "top to bottom, higher **parts** and as many prompts make more regions, a lower **sharpness** a longer "
            "transition. Painted masks do as well (Batch Masks joins them).", unread(family) + family.files]


BUILDERS: dict[str, tuple[Callable[[Graph, Modern], list[str]], Modern]] = {
    "token_scale_z_image": (token_scale, Z_IMAGE), "token_scale_klein": (token_scale, KLEIN),
    "layout_z_image": (layout, Z_IMAGE), "layout_flux": (layout, FLUX), "layout_qwen": (layout, QWEN),
    "cocktail_flux": (cocktail, FLUX),
    "regions_z_image": (regions, Z_IMAGE), "regions_flux": (regions, FLUX), "regions_qwen": (regions, QWEN)}
