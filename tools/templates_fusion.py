"""The templates of MagicFusion."""
from __future__ import annotations

from typing import Any

from graph import Graph, Link
from template_parts import CHECKPOINT, Place, add_sampling

EXPERT = "dreamshaper_8.safetensors"
ANIME = "anything-v3-fp16-pruned.safetensors"
NEGATIVE = "worst quality, blurry"


def add_checkpoint(graph: Graph, title: str, at: Place, file: str) -> int:
    return graph.add("CheckpointLoaderSimple", title, at, (320, 100), ckpt_name=file)


def add_expert(graph: Graph, title: str, at: Place, checkpoint: int, text: str, before: Link | None,
               **settings: Any) -> Link:
    """A model with prompts of its own, after the experts before it."""
    x, y = at
    prompt = graph.add("CLIPTextEncode", f"{title}: prompt", (x, y), (360, 120), clip=(checkpoint, 1), text=text)
    negative = graph.add("CLIPTextEncode", f"{title}: negative", (x, y + 170), (360, 80), clip=(checkpoint, 1),
                         text=NEGATIVE)
    wires = {} if before is None else {"experts": before}
    expert = graph.add("MixologyExpert", title, (x + 420, y), (300, 170), model=(checkpoint, 0), positive=(prompt, 0),
                       negative=(negative, 0), **wires, **settings)
    return expert, 0


def add_fusion(graph: Graph, at: Place, checkpoint: int, experts: Link, **settings: Any) -> int:
    """The guider, sampling, and a look at who painted what. Returns the guider's node."""
    x, y = at
    size = graph.add("EmptyLatentImage", "Picture size", (0, y + 150), (320, 110), width=512, height=512)
    guider = graph.add("MixologySaliencyGuider", "Fusion", (x, y), (320, 200), experts=experts, **settings)
    sampled = add_sampling(graph, (x, y + 260), checkpoint, guider, (size, 0), "mixology/fusion", steps=50)
    maps = graph.add("MixologySaliencyMaps", "Who painted what", (x + 380, y + 760), (260, 80), guider=(guider, 0),
                     latent=(sampled, 0))
    graph.add("PreviewImage", "Maps", (x + 700, y + 760), (400, 300), images=(maps, 0))
    return guider


def fusion_checkpoints(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    general = add_checkpoint(graph, "General checkpoint", (0, 0), CHECKPOINT)
    expert = add_checkpoint(graph, "Expert checkpoint", (0, 310), EXPERT)
    first = add_expert(graph, "General", (380, 0), general, "a red sports car in front of the Eiffel tower", None)
    both = add_expert(graph, "Expert", (380, 310), expert, "a red sports car in front of the Eiffel tower", first)
    add_fusion(graph, (1160, 0), general, both)
    graph.note(
        "**MagicFusion: two models, each where it knows best.**\n\n"
        "1. Choose a general checkpoint, and one that is an expert in what your picture is about. Both must be of one "
        "family (two SD1.x, or two SDXL).\n"
        "2. Each has its own prompts. Where guidance moves a model's prediction most, it knows what it wants: there it "
        "paints.\n"
        "3. **temperature** of an expert: higher gathers it on fewer places, lower spreads it. **softness** of Fusion: "
        "0 lets one model have each place, higher blends them.\n\n"
        "A step costs two evaluations for each expert. SDXL: set Picture size to 1024 x 1024.", (0, 560), (700, 280))
    return graph


def fusion_cross_domain(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    general = add_checkpoint(graph, "General checkpoint", (0, 0), CHECKPOINT)
    cartoon = add_checkpoint(graph, "Cartoon checkpoint", (0, 310), ANIME)
    text = "a lion with a crown on his head"
    first = add_expert(graph, "General", (380, 0), general, text, None)
    both = add_expert(graph, "Cartoon", (380, 310), cartoon, text, first)
    add_fusion(graph, (1160, 0), general, both, blur=0.0, end_percent=0.4, outside=0)
    graph.note(
        "**MagicFusion across domains: the idea of a cartoon, the look of a photo.**\n\n"
        "1. Both models read one prompt and share the first 40% of the steps (**end_percent**), place by place without "
        "**blur**; then the general model (**outside** 0) finishes alone.\n"
        "2. More of the cartoon: a higher **end_percent**, or **outside** 1.\n\n"
        "Both checkpoints must be of one family. SDXL: set Picture size to 1024 x 1024.", (0, 560), (700, 240))
    return graph


def fusion_two_prompts(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    model = add_checkpoint(graph, "Load Checkpoint", (0, 0), CHECKPOINT)
    first = add_expert(graph, "The thing", (380, 0), model, "a photo of a teapot", None)
    both = add_expert(graph, "The scene", (380, 310), model, "a photo of a teapot on a rock in a mountain stream",
                      first)
    add_fusion(graph, (1160, 0), model, both)
    graph.note(
        "**MagicFusion with one model: a thing in a new scene.**\n\n"
        "1. Load the model that knows the thing (a DreamBooth checkpoint, or Load LoRA behind this one).\n"
        "2. One prompt names the thing alone, the other the thing in its scene. A scene often draws a model away from "
        "the thing it was taught; here the first prompt keeps a say where the thing is.\n"
        "3. **temperature** of *The thing* higher gathers it in fewer places.\n\n"
        "Both prompts share model and negative: three evaluations a step. SDXL: set Picture size to 1024 x 1024.",
        (0, 560), (700, 260))
    return graph


def fusion_three_experts(definitions: dict[str, Any]) -> Graph:
    graph = Graph(definitions)
    text = "a knight on a horse in front of a castle, forest, sunset"
    general = add_checkpoint(graph, "General checkpoint", (0, 0), CHECKPOINT)
    experts = add_expert(graph, "General", (380, 0), general, text, None)
    for row, (title, file) in enumerate((("Second", EXPERT), ("Third", ANIME)), 1):
        checkpoint = add_checkpoint(graph, f"{title} checkpoint", (0, 310 * row), file)
        experts = add_expert(graph, title, (380, 310 * row), checkpoint, text, experts)
    add_fusion(graph, (1160, 0), general, experts)
    graph.note(
        "**MagicFusion with three models.**\n\n"
        "Chain as many Fusion Experts as you like: each joins those before it. Every place goes to the model that "
        "wants it most; **Who painted what** shows which that was, step by step.\n\n"
        "A step costs two evaluations for each expert, and all checkpoints share your memory. All must be of one "
        "family. SDXL: set Picture size to 1024 x 1024.", (0, 900), (700, 220))
    return graph


TEMPLATES = {"fusion_checkpoints": fusion_checkpoints, "fusion_cross_domain": fusion_cross_domain,
             "fusion_two_prompts": fusion_two_prompts, "fusion_three_experts": fusion_three_experts}
