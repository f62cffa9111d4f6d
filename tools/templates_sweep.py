"""The templates of sweeps and labelled grids."""
from __future__ import annotations

from graph import Graph
from templates_magicmix import BLURRY
from worlds import Real, sample, say_text


def grid(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and layout picture"):
        model = world.model(graph)
        picture = world.picture(graph, "Layout picture", "a plain yellow moon on a blue background")
    with graph.group("The picture becomes a layout", below=True):
        latent = world.encode(graph, picture, model)
        layout = graph.add("MixologyLayoutNoise", latent=latent)
    with graph.group("What it becomes", 360):
        text = world.say("a photo of a corgi sitting in the grass", "a striped orange star on a blue background")
        content = say_text(graph, "Content prompt", model, text)
        negative = say_text(graph, "Negative prompt", model, world.say(BLURRY, ""))
    with graph.group("Two lists, every pair of them", 320):
        sweep = graph.add("MixologySweep", change=True, values="nu = 0.1, 0.4, 0.7, 1",
                          values_2="k_max = 0.5, 0.65, 0.8")
        mix = graph.add("MixologyLayoutMixKSampler", model=model.model, positive=content, negative=negative,
                        layout=(layout, 0), cfg=world.pick(7.5, 4.0), nu=(sweep, 0), k_max=(sweep, 3))
    with graph.group("One sheet", 520):
        decoded = graph.add("VAEDecode", samples=(mix, 0), vae=model.vae)
        sheet = graph.add("MixologyLabelledGrid", images=(decoded, 0), across=(sweep, 5), down=(sweep, 6),
                          settings=f"{text}; cfg {world.pick(7.5, 4.0):g}, k_min 0.3")
        graph.add("SaveImage", images=(sheet, 0), filename_prefix="mixology/sweep")
    return ["**Evaluate: what two settings do to a picture.** Everything behind the sweep runs once for each pair of "
            "its values, in one queue; what stands before it runs once.",
            "Change: the lists (0.1, 0.3, or 0:1:5 for five from 0 to 1), and where they go: drag a list's output onto "
            "any widget of any node. A list of nu alone is faster in **nu_per_image** of the sampler: one run for all.",
            world.files + world.larger]


def strip(graph: Graph, world: Real) -> list[str]:
    text = world.say("a photo of a fluffy cat on a red sofa", "a striped red star on a white background")
    word = world.say("fluffy", "star")
    with graph.group("Model and five pictures"):
        model = world.model(graph)
        size = world.size(graph, 5)
        same = graph.add("LatentBatchSeedBehavior", samples=size, seed_behavior="fixed")
    with graph.group("Prompt with a list of scales", 380):
        scale = graph.add("MixologyTokenScale", change=True, model=model.model, clip=model.clip, text=text,
                          scales=f"{word} = [-2, -1, 0, 1, 2]")
        negative = say_text(graph, "Negative prompt", model, world.say(BLURRY, ""))
    with graph.group("Sample"):
        sampled = sample(graph, (scale, 0), (scale, 1), negative, (same, 0), 30, world.pick(7.5, 4.0), seed=5)
    with graph.group("One sheet", 520):
        decoded = graph.add("VAEDecode", samples=sampled, vae=model.vae)
        sheet = graph.add("MixologyLabelledGrid", change=True, images=(decoded, 0), columns=5,
                          across="\n".join(f"{word} {value}" for value in (-2, -1, 0, 1, 2)), settings=text)
        graph.add("SaveImage", images=(sheet, 0), filename_prefix="mixology/sweep")
    return ["**Evaluate: a strip of token scales.** Five pictures from one noise in one run, each with a scale of its "
            "own, on a sheet that says which.",
            "Change: the prompt, the phrase and its list, and the words above the columns, one a line. batch_size "
            "is the length of the list.", world.files + world.larger]
