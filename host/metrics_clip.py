"""Clip Metrics in the host: how well pictures fit their texts, in the space that a CLIP's two encoders share."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..metrics.image import clip_similarity, directional_similarity
from ..metrics.report import average, draw_table
from ..samplers.embeddings import check_image, pad_to_square
from ..samplers.wording import check_text, format_size, legible
from .embeddings import Asker, check_projection, embed_tokens, find_towers, tokens_of
from .notices import show_notice

NODE = "Clip Metrics"
WHO = Asker(NODE, (
    "load the text encoder of the vision model's own CLIP with its text projection, such as a CLIP-L file that holds "
    "text_projection.weight for ViT-L/14, with Load CLIP"))
FAMILIES = {768: "ViT-L/14", 1024: "ViT-H/14", 1280: "ViT-bigG/14"}  # by the width of their space
PARTS = ("whole", "left half", "right half")
FITS = ("crop", "pad")
AT_ONCE = 8  # pictures
MEANING = (
    "similarity: cosine of picture and text, to be compared within one CLIP only. directional: cosine of the picture's "
    "change with the text's, from the source; above 0 is toward it.")

Figures = tuple[str, float, float]


@dataclass(frozen=True)
class Texts:
    """What pictures are measured against; empty where not given."""

    text: str
    source_text: str = ""
    left_text: str = ""
    right_text: str = ""


def measure_clip(
    clip_vision: Any, clip: Any, image: torch.Tensor, texts: Texts, source_image: torch.Tensor | None = None,
    fit: str = "crop",
) -> Figures:
    """The report, and the means of CLIP similarity and of directional CLIP similarity, which is not a number without a
    source picture and its text.

    Args:
        image: [B, H, W, C] in 0..1.
        source_image: one picture, or one for each; of any size.
        fit: what CLIP sees of a picture that is not square: "crop" its middle square, "pad" all of it, with its mean
            colour around; so it sees halves in any case.

    Raises:
        ValueError: for encoders that do not share a space, pictures that are none, and an empty text.
    """
    width = check_projection(clip_vision, NODE)
    tower = find_tower(clip, width)
    check_texts(texts)
    images = check_image(image, NODE)
    sources = check_sources(source_image, texts, len(images))
    wanted = {"text": texts.text, **(
        {"left_text": texts.left_text, "right_text": texts.right_text} if texts.left_text and texts.right_text else {})}
    words = {name: embed_text(clip, tower, text, name) for name, text in wanted.items()}
    start = embed_text(clip, tower, texts.source_text, "source_text") if sources is not None else None
    parts = PARTS if len(words) > 1 else PARTS[:1]
    seen = {part: embed_pictures(clip_vision, cut(images, part, fit)) for part in parts}
    check_widths(seen["whole"], words["text"])
    similar = {name: [clip_similarity(seen[part], word) for part in parts] for name, word in words.items()}
    report = [draw_means("similarity", parts, similar)]
    directional: dict[str, list[torch.Tensor]] = {}
    if sources is not None and start is not None:
        before = {part: embed_pictures(clip_vision, cut(sources, part, fit)) for part in parts}
        directional = {name: [directional_similarity(seen[part], before[part], word, start) for part in parts]
                       for name, word in words.items()}
        tell_standstill(seen["whole"], before["whole"], words["text"], start)
        report += ["", draw_means("directional", parts, directional)]
    if len(images) > 1:
        report += ["", draw_each(similar["text"][0], directional["text"][0] if directional else None)]
    means = [average(column[0].tolist()) for column in (similar["text"], directional.get("text", [torch.empty(0)]))]
    about = f"{len(images)} picture(s) of {format_size(reversed(images.shape[1:3]))} pixels."
    return "\n".join([*report, "", about, MEANING]), means[0], means[1]


def find_tower(clip: Any, width: int) -> str:
    """The text encoder of a CLIP whose space has this width.

    Raises:
        ValueError: if there is none.
    """
    towers = find_towers(clip, WHO)
    model = clip.cond_stage_model
    widths = {name: getattr(model, name).transformer.text_projection.weight.shape[0] for name in towers}
    fitting = next((name for name, own in widths.items() if own == width), None)
    if fitting is None:
        found = " and ".join(name_space(own) for own in widths.values())
        raise ValueError(
            f"{NODE} expected a vision and a text encoder of one CLIP, got pictures in a space of {name_space(width)} "
            f"and texts in one of {found}; {WHO.remedy}.")
    return fitting


def name_space(width: int) -> str:
    """A space by its width, and the CLIP that is known for it."""
    return f"{width} numbers" + (f" ({FAMILIES[width]})" if width in FAMILIES else "")


def check_widths(pictures: torch.Tensor, text: torch.Tensor) -> None:
    """Raises ValueError unless embeddings [B, E] and [1, E] are of one width and are numbers."""
    if pictures.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"{NODE} expected a vision and a text encoder of one CLIP, got pictures in a space of "
            f"{name_space(pictures.shape[-1])} and texts in one of {name_space(text.shape[-1])}; {WHO.remedy}.")
    if not bool(pictures.isfinite().all() and text.isfinite().all()):
        raise ValueError(
            f"{NODE} expected embeddings of numbers, got NaN or infinite ones; load the CLIP at a higher precision "
            f"(fp16 can overflow), or look at its file.")


def check_texts(texts: Texts) -> None:
    """Tells of a side's text without the other's. Raises ValueError for an empty text, and for what is no text."""
    for name, text in vars(texts).items():
        check_text(text, f"{name} of {NODE}")
    if not texts.text.strip():
        raise ValueError(f"{NODE} expected a text, got an empty one; write what the pictures shall show.")
    if bool(texts.left_text) != bool(texts.right_text):
        given, missing = ("left", "right") if texts.left_text else ("right", "left")
        show_notice(f"{NODE}: {given}_text is not measured without {missing}_text; write both, or neither.")


def check_sources(source: torch.Tensor | None, texts: Texts, count: int) -> torch.Tensor | None:
    """The pictures before, if there is a text for them; tells of one without the other.

    Raises:
        ValueError: if there is neither one nor one for each.
    """
    if source is None or not texts.source_text.strip():
        if source is not None:
            show_notice(f"{NODE}: source_image is not measured without source_text; write what it shows.")
        elif texts.source_text.strip():
            show_notice(f"{NODE}: source_text is not measured without source_image; connect the picture before.")
        return None
    sources = check_image(source, NODE)
    if len(sources) not in (1, count):
        raise ValueError(
            f"{NODE} expected one source_image, or one for each of the {count} pictures, got {len(sources)}; make the "
            f"two batches equally long.")
    return sources


def embed_text(clip: Any, tower: str, text: str, name: str) -> torch.Tensor:
    """A text's direction [1, E]; tells of a text that CLIP does not read to its end."""
    tokens = clip.tokenize(text)
    pieces = len(tokens_of(tokens, tower))
    if pieces > 1:
        show_notice(
            f"{NODE}: {name} ('{legible(text, 30)}') is longer than what CLIP reads at once (75 tokens); only its "
            f"beginning is measured.")
    return normalise(embed_tokens(clip, tower, tokens, WHO))


def embed_pictures(clip_vision: Any, images: torch.Tensor) -> torch.Tensor:
    """Directions of pictures [B, E]."""
    found: list[torch.Tensor] = []
    for few in images.split(AT_ONCE):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found.append(normalise(clip_vision.encode_image(few)["image_embeds"]))
    return torch.cat(found)


def normalise(embeddings: torch.Tensor) -> torch.Tensor:
    """At length 1, in float64 on the CPU."""
    return torch.nn.functional.normalize(embeddings.detach().cpu().double(), dim=-1)


def cut(images: torch.Tensor, part: str, fit: str) -> torch.Tensor:
    """A part of pictures [B, H, W, C], as CLIP shall see it."""
    if part == "whole":
        return pad_to_square(images) if fit == "pad" else images
    middle = max(1, images.shape[2] // 2)
    return pad_to_square(images[:, :, :middle] if part == "left half" else images[:, :, -middle:])


def tell_standstill(after: torch.Tensor, before: torch.Tensor, text: torch.Tensor, start: torch.Tensor) -> None:
    """Tells where a direction is measured that does not exist."""
    if torch.equal(text, start):
        show_notice(f"{NODE}: text and source_text say the same, so that there is no direction; write what changed.")
    elif bool((after == before).all(-1).any()):
        show_notice(f"{NODE}: a picture is its source_image, so that it has no direction and counts as 0.")


def draw_means(title: str, parts: Sequence[str], figures: dict[str, list[torch.Tensor]]) -> str:
    """A table of means over the pictures: a text a line, a part of the picture a column."""
    return draw_table([title, *parts], [
        (name, [average(column.tolist()) for column in columns]) for name, columns in figures.items()])


def draw_each(similar: torch.Tensor, directional: torch.Tensor | None) -> str:
    """A table of the pictures, against the text."""
    columns = {"similarity": similar} if directional is None else {"similarity": similar, "directional": directional}
    return draw_table(["picture", *columns], [
        (str(place + 1), [float(column[place]) for column in columns.values()]) for place in range(len(similar))])
