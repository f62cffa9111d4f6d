"""The templates of MagicFusion."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graph import Graph, Link
from worlds import ANIME, DREAM, Model, Real, sample_custom, save, say_text

NEGATIVE = "worst quality, blurry"
Part = tuple[str, Model, str]  # an expert's name, its model and its prompt


def fuse(graph: Graph, world: Real, parts: Sequence[Part], size: Link, steps: int = 50, **settings: Any) -> None:
    """Experts with prompts of their own, their fusion, and a look at who painted what."""
    prompts: list[tuple[Link, Link]] = []
    with graph.group("A prompt for each", 300):
        for title, model, text in parts:
            prompts.append((say_text(graph, f"{title}: prompt", model, text),
                            say_text(graph, f"{title}: negative", model, world.say(NEGATIVE, ""))))
    before: Link | None = None
    with graph.group("Experts, one after the other"):
        for (title, model, _), (positive, negative) in zip(parts, prompts):
            wires: dict[str, Any] = {} if before is None else {"experts": before}
            before = graph.add("MixologyExpert", title, change=True, model=model.model, positive=positive,
                               negative=negative, cfg=world.pick(7.5, 4.0), **wires), 0
        guider = graph.add("MixologySaliencyGuider", change=True, experts=before, **settings), 0
    with graph.group("Sample"):
        sampled = sample_custom(graph, parts[0][1], guider, size, steps=int(world.pick(steps, 20)))
    with graph.group("Picture, and who painted what", 350):
        picture = save(graph, sampled, parts[0][1], "fusion")
        graph.add("MixologySaliencyMaps", guider=guider, latent=sampled, image=picture)


def checkpoints(graph: Graph, world: Real) -> list[str]:
    text = world.say("a red sports car in front of the Eiffel tower", "a striped red heart on a yellow background")
    with graph.group("Two models"):
        general = world.model(graph, "General checkpoint", name="scenes")
        expert = world.model(graph, "Expert checkpoint", DREAM, "hearts")
        size = world.size(graph)
    fuse(graph, world, [("General", general, text), ("Expert", expert, text)], size)
    return ["**MagicFusion: two models, each where it knows best.** Where guidance moves a model's prediction most, it "
            "paints. A step costs two evaluations for each expert.",
            "Change: a general checkpoint and one that is an expert in what your picture is about (one family), and "
            "the prompts. **temperature** of an expert higher gathers it on fewer places; **softness** 0 lets one "
            "model have each place, higher blends.", world.files + world.larger]


def cross_domain(graph: Graph, world: Real) -> list[str]:
    text = "a lion with a crown on his head"
    with graph.group("Two models"):
        general = world.model(graph, "General checkpoint")
        cartoon = world.model(graph, "Cartoon checkpoint", ANIME)
        size = world.size(graph)
    fuse(graph, world, [("General", general, text), ("Cartoon", cartoon, text)], size, blur=0.0, end_percent=0.4,
         outside=0)
    return ["**MagicFusion across domains: the idea of a cartoon, the look of a photo.** Both models share the first "
            "40% of the steps (**end_percent**), place by place without **blur**; then the general one finishes alone.",
            "Change: both checkpoints (one family) and the prompt. More of the cartoon: a higher **end_percent**, or "
            "**outside** 1.", world.files + world.larger]


def two_prompts(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and size"):
        model = world.model(graph)
        size = world.size(graph)
    fuse(graph, world, [("The thing", model, "a photo of a teapot"),
                        ("The scene", model, "a photo of a teapot on a rock in a mountain stream")], size)
    return ["**MagicFusion with one model: a thing in a new scene.** One prompt names the thing alone, the other the "
            "thing in its scene; the first keeps a say where the thing is. Three evaluations a step.",
            "Change: a model that knows the thing (a DreamBooth checkpoint, or Load LoRA behind this one), and both "
            "prompts. **temperature** of *The thing* higher gathers it in fewer places.", world.files + world.larger]


def three_experts(graph: Graph, world: Real) -> list[str]:
    text = "a knight on a horse in front of a castle, forest, sunset"
    with graph.group("Three models"):
        models = [world.model(graph, f"{title} checkpoint", **({"file": file} if file else {}))
                  for title, file in (("General", ""), ("Second", DREAM), ("Third", ANIME))]
        size = world.size(graph)
    fuse(graph, world, [(title, model, text) for title, model in zip(("General", "Second", "Third"), models)], size)
    return ["**MagicFusion with three models.** Chain as many Fusion Experts as you like: each joins those before it, "
            "and every place goes to the model that wants it most.",
            "Change: the checkpoints (one family) and the prompts. A step costs two evaluations for each expert, and "
            "all checkpoints share your memory. Saliency Maps shows who painted what, step by step.",
            world.files + world.larger]
