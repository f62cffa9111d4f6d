"""What the names in a checkpoint's file tell of what its model was trained on."""
from __future__ import annotations

from .embeddings import read_names

PROMPT_TOWERS = ("cond_stage_model.transformer.", "cond_stage_model.model.transformer.", "conditioner.embedders.",
                 "text_encoders.")
IMAGE_TOWER = "cond_stage_model.model.visual."  # where an SD2.x checkpoint has its text encoder alone
PROMPTS = (
    "Mixer Conditioning: this model's checkpoint brings a text encoder, so it was trained on prompts and will not "
    "understand image embeddings; load an image-mixer or image-variations checkpoint.")


def brings_prompts(path: str) -> bool:
    """Whether a checkpoint's file holds a text encoder, and no image encoder in its place."""
    names = read_names(path) or set()
    prompts, pictures = (any(name.startswith(tower) for name in names) for tower in (PROMPT_TOWERS, IMAGE_TOWER))
    return prompts and not pictures
