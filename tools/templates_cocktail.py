"""The templates of Diffusion Cocktail."""
from __future__ import annotations

from graph import Graph, Link
from worlds import DREAM, Model, Real, sample, save, say_text

NEGATIVE = "worst quality, blurry"
LIGHTHOUSE = "a photo of a lighthouse on a cliff by the sea"
STAR = "a striped red star on a blue background"


def paint_source(graph: Graph, world: Real, model: Model, text: str) -> Link:
    """A picture that the source model paints: its latent."""
    size = world.size(graph)
    prompt = say_text(graph, "Source prompt", model, text)
    negative = say_text(graph, "Source negative", model, world.say(NEGATIVE, ""))
    painted = sample(graph, model.model, prompt, negative, size, 30, world.pick(7.5, 4.0), "Source", seed=21)
    seen = graph.add("VAEDecode", samples=painted, vae=model.vae)
    graph.add("PreviewImage", "Source picture", images=(seen, 0))
    return painted


def invert(graph: Graph, world: Real, model: Model, text: str, latent: Link) -> Link:
    """The picture's way back to noise, read with what it shows."""
    shown = say_text(graph, "What the picture shows", model, text)
    if not world.suffix:  # Ditail's blend of prompts
        unwanted = say_text(graph, "What it does not show", model, NEGATIVE)
        shown = graph.add("MixologyBlendPrompts", positive=shown, negative=unwanted), 0
    return graph.add("MixologyInvert", model=model.model, conditioning=shown, latent=latent,
                     steps=int(world.pick(50, 30))), 0


def repaint(graph: Graph, world: Real, model: Model, text: str, trajectory: Link) -> None:
    """Sampling with the target model along the trajectory, to the saved picture."""
    with graph.group("What it becomes", 300):
        empty = say_text(graph, "Empty prompt", model, "")
        positive = say_text(graph, "What it shall become", model, text)
        negative = say_text(graph, "Negative prompt", model, world.say(NEGATIVE, ""))
    with graph.group("Repaint along that way"):
        mix = graph.add("MixologyCocktailKSampler", change=True, model=model.model, trajectory=trajectory,
                        source_conditioning=empty, positive=positive, negative=negative, cfg=world.pick(7.5, 3.0))
        save(graph, (mix, 0), model, "cocktail")


def checkpoints(graph: Graph, world: Real) -> list[str]:
    text = world.say(LIGHTHOUSE, STAR)
    with graph.group("Two models"):
        source = world.model(graph, "Source checkpoint")
        target = world.model(graph, "Target checkpoint", DREAM, "sketch")
    with graph.group("The source's picture", 300):
        painted = paint_source(graph, world, source, text)
    with graph.group("Its way back to noise", 300):
        trajectory = invert(graph, world, source, text, painted)
    repaint(graph, world, target, world.say("a lighthouse on a cliff by the sea", STAR), trajectory)
    return ["**Diffusion Cocktail: the content of one model, the style of another.** The source paints a picture, DDIM "
            "Inversion follows it back to noise, the target paints from there; the source's attention and features "
            "hold the structure.",
            "Change: both models (of one family), the prompts. **attention_until** and **features_until** higher: "
            "more structure; lower: more of the target's own. A higher **cfg** changes more of the look.",
            world.files + world.larger]


def lora(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and style"):
        source = world.model(graph)
        target = world.lora(graph, source, 0.9)
    with graph.group("The model's picture", 300):
        painted = paint_source(graph, world, source, LIGHTHOUSE)
    with graph.group("Its way back to noise", 300):
        trajectory = invert(graph, world, source, LIGHTHOUSE, painted)
    repaint(graph, world, target, "pixel art, PixArFK, a lighthouse on a cliff by the sea", trajectory)
    return ["**Diffusion Cocktail with a LoRA: the same picture in the LoRA's style.** The checkpoint paints a "
            "picture, DDIM Inversion follows it back to noise without the LoRA, and it is painted anew with it.",
            "Change: the LoRA (with its trigger words in *What it shall become*) and its strength, the prompts, "
            "**cfg**; **attention_until** and **features_until** say how much of the structure stays.",
            "LoRAs go to models/loras. " + world.files + world.larger]


def photo(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model and picture"):
        model = world.model(graph, name="sketch")
        picture = world.picture(graph, "Picture", "a plain red circle on a white background")
    with graph.group("Its way back to noise", 300):
        latent = world.encode(graph, picture, model)
        trajectory = invert(graph, world, model, world.say(
            "a drawing of a girl in a pink dress on a green hill", "a plain red circle on a white background"), latent)
    repaint(graph, world, model, world.say("a watercolor painting of a girl in a pink dress on a green hill",
                                           "a plain red circle on a white background"), trajectory)
    return ["**Diffusion Cocktail: a photo in another style, its structure kept.** DDIM Inversion follows the picture "
            "back to noise; KSampler (Cocktail) paints it anew along the same way.",
            "Change: the picture, what it shows and what it shall become. A style checkpoint or LoRA for repainting "
            "does more than words: load it beside this one, with its own CLIP for the prompts on the right. Save "
            "Trajectory keeps an inversion for later.", world.files + world.larger]
