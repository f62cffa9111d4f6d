"""The templates of Image Mixer."""
from __future__ import annotations

from typing import Any

from graph import Graph, Link
from worlds import Model, Real, sample, save

NEEDS = ("It needs a model that was trained on image embeddings, such as image-mixer-pruned.ckpt (in "
         "models/checkpoints), and CLIP ViT-L/14 (in models/clip_vision; for words also in models/text_encoders). "
         "Image Variations checkpoints: slots 1, 512 x 512.")


def see(graph: Graph, role: str, model: Model, picture: Link, before: Link | None, **settings: Any) -> Link:
    """A picture, or a crop of it, after the sources before it."""
    wires: dict[str, Any] = {} if before is None else {"mixer": before}
    return graph.add("MixologyMixerImage", role, change=True, clip_vision=model.vision, image=picture, **wires,
                     **settings), 0


def paint(graph: Graph, world: Real, model: Model, mixer: Link) -> None:
    """The mix's conditioning, sampling and the saved picture."""
    with graph.group("Mix and sample"):
        size = world.size(graph, side=640)
        mix = graph.add("MixologyMixerConditioning", change=True, mixer=mixer, model=model.model)
        sampled = sample(graph, model.model, (mix, 0), (mix, 1), size, 30, 3.0, seed=5)
    with graph.group("Picture", 320):
        save(graph, sampled, model, "mixer")


def two_pictures(graph: Graph, world: Real) -> list[str]:
    mixer: Link | None = None
    with graph.group("Model"):
        model = world.mixer(graph, words=False)
    with graph.group("Two pictures"):
        pictures = [world.picture(graph, title, caption) for title, caption in (
            ("First picture", "a checkered white heart on a purple background"),
            ("Second picture", "a plain yellow moon on a blue background"))]
    with graph.group("As CLIP sees them"):
        for title, picture in zip(("First", "Second"), pictures):
            mixer = see(graph, title, model, picture, mixer)
    assert mixer is not None
    paint(graph, world, model, mixer)
    return ["**Image Mixer: two pictures become one.** Each picture becomes one token that the model attends to, as a "
            "prompt's words are.",
            "Change: the pictures; **strength** by a tenth at a time for the one that gets lost; **mode** concat keeps "
            "both apart, average blends them. More pictures: another Mixer Image between. Keep **cfg** near 3 and both "
            "outputs of Mixer Conditioning wired.", world.say(NEEDS, world.files)]


def picture_words(graph: Graph, world: Real) -> list[str]:
    with graph.group("Model"):
        model = world.mixer(graph, words=True)
    with graph.group("Picture"):
        picture = world.picture(graph, "Picture", "a plain red star on a blue background")
    with graph.group("Picture and words", 300):
        image = see(graph, "The picture", model, picture, None)
        words = graph.add("MixologyMixerText", "The words", change=True, clip=model.clip, text="a snowy forest",
                          strength=1.4, mixer=image), 0
    paint(graph, world, model, words)
    return ["**Image Mixer: a picture and words.** CLIP puts pictures and texts into one space, so words are one more "
            "token; short ones work best.",
            "Change: the picture, the words and their **strength** (words are weaker than pictures: 1.4 to 1.5). To "
            "change what the picture shows, take a direction: two Mixer Text nodes, what it shall become with +0.5, "
            "what it is with -0.5, and **mode** sum. CLIP must come from Load CLIP.", world.say(NEEDS, world.files)]


def crops(graph: Graph, world: Real) -> list[str]:
    mixer: Link | None = None
    with graph.group("Model"):
        model = world.mixer(graph, words=False)
    with graph.group("One picture"):
        picture = world.picture(graph, "Picture", "a plain red star on a blue background")
    with graph.group("Its parts"):
        for title, x, y, side in (("The middle", 0.2, 0.2, 0.6), ("Left half", 0.0, 0.25, 0.5),
                                  ("Right half", 0.5, 0.25, 0.5), ("The ground", 0.0, 0.7, 0.3)):
            mixer = see(graph, title, model, picture, mixer, x=x, y=y, width=side, height=side)
    assert mixer is not None
    paint(graph, world, model, mixer)
    return ["**Image Mixer: crops of one picture.** Only what the crops show comes through, newly composed.",
            "Change: the picture, and each crop's **x**, **y**, **width** and **height** as fractions of it. "
            "**strength** 0 leaves a part out; another picture wired to one of them exchanges that part. Up to five "
            "sources.", world.say(NEEDS, world.files)]
