"""The template that measures pictures."""
from __future__ import annotations

from graph import Graph, Link
from worlds import Real, save, say_text

COLUMN, REPORT = 260, 440  # the second has room for a report's lines
NEEDS = ("CLIP ViT-L/14 in models/clip_vision and in models/text_encoders; LPIPS as well where the report says what to "
         "put where. ")


def two_merges(graph: Graph, world: Real) -> list[str]:
    shows = world.say("a village by the sea", "a plain red circle on a white background")
    styles = (
        world.say("a Van Gogh painting of a village by the sea, bold swirling brushstrokes, vibrant colors",
                  "a striped red circle on a white background"),
        world.say("a Minecraft rendering of a village by the sea, pixelated textures, blocky cubes",
                  "a dotted red circle on a white background"))
    both = world.say("a village by the sea, Van Gogh on the left, Minecraft on the right",
                     "a striped dotted red circle on a white background")
    with graph.group("Model and picture", COLUMN):
        model = world.model(graph)
        vision, judge = world.judge(graph, model)
        picture = world.fit(graph, world.picture(graph, "Picture", shows))
        latent = graph.add("VAEEncode", pixels=picture, vae=model.vae), 0
    with graph.group("Two styles", COLUMN):
        source = say_text(graph, "What it shows", model, shows)
        left, right = (say_text(graph, f"{side} style", model, style)
                       for side, style in zip(("Left", "Right"), styles))
        negative = say_text(graph, "Negative prompt", model, "")
    with graph.group("How both sample", COLUMN, below=True):
        noise = graph.add("RandomNoise", change=True)
        cycle = graph.add("MixologyCycleSampler", conditioning=source)
        sigmas = graph.add("BasicScheduler", model=model.model, scheduler="ddim_uniform", steps=50, denoise=0.8)
    with graph.group("Two merges", COLUMN):
        masks = graph.add("MixologyGradientMask", change=True, profile="logistic")
        epsilon = graph.add("MixologyEpsilonMergeGuider", model=model.model, masks=(masks, 0), positives=[left, right],
                            negative=negative, cfg=world.pick(7.5, 4.0))
        merge = graph.add("MixologyAttentionMerge", model=model.model, masks=(masks, 0), conditionings=[left, right])
        attention = graph.add("CFGGuider", "Attention", model=(merge, 0), positive=(merge, 1), negative=negative,
                              cfg=world.pick(7.5, 4.0))
    results: list[Link] = []
    for title, guider in (("Epsilon", epsilon), ("Attention", attention)):
        with graph.group(f"{title} merge", COLUMN, below=bool(results)):
            sampled = graph.add("SamplerCustomAdvanced", title, noise=(noise, 0), guider=(guider, 0),
                                sampler=(cycle, 0), sigmas=(sigmas, 0), latent_image=latent)
            results.append(save(graph, (sampled, 0), model, f"merge_{title.lower()}"))
    with graph.group("Both as one batch", COLUMN, below=True):
        batch = graph.add("BatchImagesNode", images=results)
    with graph.group("Measured", REPORT):
        graph.add("MixologyImageMetrics", image=(batch, 0), reference=picture)
        for title, result in zip(("Epsilon", "Attention"), results):
            graph.add("MixologyClipMetrics", title, change=True, clip_vision=vision, clip=judge, image=result,
                      text=both, source_image=picture, source_text=shows, left_text=styles[0], right_text=styles[1])
    return ["**Two merges of two styles, measured.** One picture is restyled twice along one noise: merged in epsilon "
            "(picture 1), and in attention (picture 2).",
            "Change: picture, styles and masks, and the same texts in both Clip Metrics. Image Metrics says how much "
            "of the picture stayed and how smooth the middle is; Clip Metrics how well each style arrived on its half, "
            "and whether the change went its way. One picture proves little: compare means of many, over seeds.",
            world.say(NEEDS, "") + world.files]
