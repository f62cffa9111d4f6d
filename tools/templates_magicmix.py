"""The templates of MagicMix and of the token attention scale."""
from __future__ import annotations

from graph import Graph
from worlds import Real, sample, save, say_text

BLURRY = "blurry, low quality"


def image_text(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and layout picture"):
        model = world.model(graph)
        picture = world.picture(graph, "Layout picture", "a plain yellow moon on a blue background")
    with graph.group("The picture becomes a layout"):
        latent = world.encode(graph, picture, model)
        layout = graph.add("MixologyLayoutNoise", latent=latent)
    with graph.group("What it becomes", 360):
        content = say_text(graph, "Content prompt", model, world.say(
            "a photo of a corgi sitting in the grass", "a striped orange star on a blue background"))
        negative = say_text(graph, "Negative prompt", model, world.say(BLURRY, ""))
    with graph.group("Mix"):
        mix = graph.add("MixologyLayoutMixKSampler", change=True, model=model.model, positive=content,
                        negative=negative, layout=(layout, 0), cfg=world.pick(7.5, 4.0),
                        nu_per_image=world.say("", "0.1, 0.3, 0.5, 0.7, 0.9"))
    with graph.group("Picture"):
        save(graph, (mix, 0), model, "layout_mix")
    return ["**MagicMix: the layout of a picture, the content of a prompt.** The first steps follow the picture, the "
            "last ones the prompt.",
            "Change: the picture, the content prompt, and **nu**: 0 keeps the picture, 1 is plain image to image; "
            "alike things mix at 0.1 to 0.4, unlike ones at 0.5 to 0.9. **nu_per_image** (0.1, 0.3, 0.5) is a whole "
            "sweep in one run.", world.files + world.larger]


def text_text(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and size"):
        model = world.model(graph)
        size = world.size(graph)
    with graph.group("Two prompts", 320):
        first = say_text(graph, "Layout prompt", model, "a photo of a coffee machine on a table")
        content = say_text(graph, "Content prompt", model, "a photo of a corgi")
        negative = say_text(graph, "Negative prompt", model, BLURRY)
    with graph.group("The first prompt's layout"):
        layout = graph.add("MixologyLayoutFromPrompt", change=True, model=model.model, positive=first,
                           negative=negative, latent=size, finish=True)
        seen = graph.add("VAEDecode", samples=(layout, 1), vae=model.vae)
        graph.add("PreviewImage", "Layout", images=(seen, 0))
    with graph.group("Mix"):
        mix = graph.add("MixologyLayoutMixKSampler", change=True, model=model.model, positive=content,
                        negative=negative, layout=(layout, 0), nu=0.7)
    with graph.group("Picture"):
        save(graph, (mix, 0), model, "layout_mix")
    return ["**MagicMix: the layout of one prompt, the content of another.** The layout prompt is sampled first and "
            "its states are recorded; the content prompt is held to them.",
            "Change: both prompts, the layout's seed, **nu** or **nu_per_image**. Keep steps and scheduler the same in "
            "both nodes. **finish** off saves the steps that only show the layout.", world.files + world.larger]


def concept_removal(graph: Graph, world: Real) -> list[str]:
    text = world.say("a photo of a tiger in a forest", "a plain red star on a white background")
    word = world.say("tiger", "star")
    with graph.group("Model and size"):
        model = world.model(graph)
        size = world.size(graph)
    with graph.group("What the picture shows", 320):
        shown = say_text(graph, "Layout prompt", model, text)
        negative = say_text(graph, "Negative prompt", model, "")
        scale = graph.add("MixologyTokenScale", "What to remove", change=True, model=model.model, clip=model.clip,
                          text=text, scales=f"{word} = -2")
    with graph.group("Its layout"):
        layout = graph.add("MixologyLayoutFromPrompt", change=True, model=model.model, positive=shown,
                           negative=negative, latent=size, finish=True, cfg=world.pick(7.5, 4.0),
                           k_max=world.pick(0.6, 0.75))
        seen = graph.add("VAEDecode", samples=(layout, 1), vae=model.vae)
        graph.add("PreviewImage", "Before", images=(seen, 0))
    with graph.group("The same without it"):
        mix = graph.add("MixologyLayoutMixKSampler", change=True, model=(scale, 0), positive=(scale, 1),
                        negative=negative, layout=(layout, 0), nu=0.9, cfg=world.pick(7.5, 4.0),
                        k_max=world.pick(0.6, 0.75))
    with graph.group("Picture"):
        save(graph, (mix, 0), model, "concept_removal")
    return [f"**MagicMix: take a concept out of a picture and keep its layout.** A {word} is painted, then painted "
            "away: its word gets a negative value, and the layout fills with something else.",
            "Change: the prompt (the same in both nodes) and the word. **nu** near 1 lets go of the old content, "
            "**k_max** higher allows larger changes (the same in both nodes). For a picture of your own, put Load "
            "Image, VAE Encode and Layout Noise in the place of Layout Noise (Prompt).", world.files + world.larger]


def token_scale(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and five pictures"):
        model = world.model(graph)
        size = world.size(graph, 5)
        same = graph.add("LatentBatchSeedBehavior", samples=size, seed_behavior="fixed")
    with graph.group("Prompt with scales", 380):
        scale = graph.add("MixologyTokenScale", change=True, model=model.model, clip=model.clip, text=world.say(
            "a photo of a fluffy cat on a red sofa", "a striped red star on a white background"), scales=world.say(
            "fluffy = [-2, -1, 0, 1, 2]", "striped = [-2, -1, 0, 1, 2]"))
        negative = say_text(graph, "Negative prompt", model, world.say(BLURRY, ""))
    with graph.group("Sample"):
        sampled = sample(graph, (scale, 0), (scale, 1), negative, (same, 0), 30, world.pick(7.5, 4.0), seed=5)
    with graph.group("Pictures", 400):
        save(graph, sampled, model, "token_scale")
    return ["**Token attention scale: turn a word up, down, or into its absence.** Five pictures from the same noise, "
            "each with its own value for one word.",
            "Change: the prompt, and below it one phrase a line with its value: 1 changes nothing, 0 hides the words, "
            "below 0 removes what they name, above 1 stresses it. A list gives each picture of the batch its own; for "
            "one picture write one number and set batch_size to 1.", world.files + world.larger]
