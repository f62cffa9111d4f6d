"""The templates of dual style and CycleDiffusion."""
from __future__ import annotations

from graph import Graph, Link
from worlds import Model, Real, sample, sample_custom, save, say_text

VAN_GOGH = "a Van Gogh painting of a village by the sea, bold swirling brushstrokes, vibrant colors"
PIXELS = "a Minecraft rendering of a village by the sea, pixelated textures, blocky cubes, sharp right angles"
BLURRY = "blurry, low quality"


def add_styles(graph: Graph, world: Real, model: Model) -> tuple[Link, Link, Link]:
    left = say_text(graph, "Left style", model, world.say(VAN_GOGH, "a striped red circle on a white background"))
    right = say_text(graph, "Right style", model, world.say(PIXELS, "a dotted red circle on a white background"))
    return left, right, say_text(graph, "Negative prompt", model, world.say(BLURRY, ""))


def epsilon(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and size"):
        model = world.model(graph)
        size = world.size(graph)
    with graph.group("Who paints where", below=True):
        masks = graph.add("MixologyGradientMask", change=True, profile="logistic")
    with graph.group("Two styles", 360):
        left, right, negative = add_styles(graph, world, model)
    with graph.group("Merge"):
        guider = graph.add("MixologyEpsilonMergeGuider", model=model.model, masks=(masks, 0), positives=[left, right],
                           negative=negative, cfg=world.pick(7.5, 4.0))
    with graph.group("Sample"):
        sampled = sample_custom(graph, model, (guider, 0), size)
    with graph.group("Picture"):
        save(graph, sampled, model, "dual_style")
    return ["**Dual style: two prompts share one picture, without a seam.** Their predictions are merged by masks at "
            "each step.",
            "Change: what both show should be the same, only the style differs. Gradient Masks: logistic keeps both "
            "sides pure with a short transition, linear blends all the way; **angle** 90 goes from top to bottom; "
            "higher **parts** and as many prompts make more styles. **cfg_per_style** (5, 9) helps a style that the "
            "other one drowns.", world.files + world.larger]


def attention(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and size"):
        model = world.model(graph)
        size = world.size(graph)
    with graph.group("Who paints where", below=True):
        masks = graph.add("MixologyGradientMask", change=True, profile="logistic", sharpness=30.0)
    with graph.group("Two styles", 360):
        left, right, negative = add_styles(graph, world, model)
    with graph.group("Merge and sample"):
        merge = graph.add("MixologyAttentionMerge", model=model.model, masks=(masks, 0), conditionings=[left, right])
        sampled = sample(graph, (merge, 0), (merge, 1), negative, size, 30, world.pick(10.0, 6.0))
    with graph.group("Picture", 400):
        save(graph, sampled, model, "dual_style")
    return ["**Dual style by attention: two prompts in one model evaluation.** Hardly dearer than one prompt, and the "
            "picture stays of a piece.",
            "Change: both styles, masks and seed. Where one style takes over, raise **cfg** and **sharpness**, or "
            "merge in epsilon (the other Dual Style template), which keeps styles apart more surely.",
            world.files + world.larger]


def four_corners(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and size"):
        model = world.model(graph)
        size = world.size(graph)
    with graph.group("Who paints where", below=True):
        masks = graph.add("MixologyGradientMask", change=True, profile="logistic", rows=2)
    with graph.group("Four prompts", 360):
        corners = [say_text(graph, title, model, f"a tree on a hill, {season}") for title, season in (
            ("Top left", "spring, blossoms, soft morning light"), ("Top right", "summer, lush green, bright noon"),
            ("Bottom left", "autumn, red and golden leaves"), ("Bottom right", "winter, bare branches, snow"))]
        negative = say_text(graph, "Negative prompt", model, BLURRY)
    with graph.group("Merge"):
        guider = graph.add("MixologyEpsilonMergeGuider", model=model.model, masks=(masks, 0), positives=corners,
                           negative=negative)
    with graph.group("Sample"):
        sampled = sample_custom(graph, model, (guider, 0), size)
    with graph.group("Picture"):
        save(graph, sampled, model, "four_corners")
    return ["**Four corners: four prompts share one picture.** A step costs one evaluation for each prompt and one for "
            "the negative.",
            "Change: what each corner shows; whatever all share holds the picture together. **parts** counts the "
            "styles from left to right, **rows** from top to bottom; connect prompts row by row, up to 16.",
            world.files + world.larger]


def restyle(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and picture"):
        model = world.model(graph)
        picture = world.picture(graph, "Picture", "a plain red circle on a white background")
    with graph.group("Size and latent"):
        latent = world.encode(graph, picture, model)
    with graph.group("What changes", 360):
        source = say_text(graph, "What the picture shows", model, world.say(
            "a drawing of a girl in a pink dress on a green hill", "a plain red circle on a white background"))
        target = say_text(graph, "What it shall become", model, world.say(
            "a Van Gogh painting of a girl in a pink dress on a green hill, swirling brushstrokes",
            "a striped red circle on a white background"))
        negative = say_text(graph, "Negative prompt", model, "")
        cycle = graph.add("MixologyCycleSampler", conditioning=source)
        guider = graph.add("CFGGuider", change=True, model=model.model, positive=target, negative=negative,
                           cfg=world.pick(5.0, 4.0))
    with graph.group("Sample"):
        sampled = sample_custom(graph, model, (guider, 0), latent, sampler=(cycle, 0), steps=50, denoise=0.8)
    with graph.group("Picture"):
        save(graph, sampled, model, "restyle")
    return ["**CycleDiffusion: a picture in another style, with all else kept.** Only the difference between the two "
            "prompts changes the picture.",
            "Change: the picture, what it shows, and the same again in the style that it shall have. **denoise** and "
            "**cfg** decide how far it goes. Two styles in one picture: Epsilon Merge Guider in place of CFGGuider.",
            world.files + world.larger]
