"""The templates' file names, which the GUI shows as their titles, by the short names that the tools use."""
from __future__ import annotations

from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
DEMO = "_demo"
NO_DOWNLOAD = " (demo, no download)"
TITLES = {
    "magicmix_image_text": "MagicMix - layout of a picture, content of a prompt",
    "magicmix_text_text": "MagicMix - layout of one prompt, content of another",
    "concept_removal": "MagicMix - remove a thing, keep the layout",
    "token_scale": "Token Scale - turn a word up, down or off",
    "dual_style_epsilon": "Dual Style - two styles side by side, kept apart",
    "dual_style_attention": "Dual Style - two styles in one evaluation",
    "four_corners": "Dual Style - a prompt for each corner",
    "restyle_photo": "Dual Style - restyle a picture, keep all else",
    "cocktail_checkpoints": "Cocktail - content of one model, style of another",
    "cocktail_lora": "Cocktail - a picture in the style of a LoRA",
    "cocktail_photo": "Cocktail - a photo in another style",
    "fusion_checkpoints": "MagicFusion - two models, each where it knows best",
    "fusion_cross_domain": "MagicFusion - idea of a cartoon, look of a photo",
    "fusion_two_prompts": "MagicFusion - a thing in a new scene",
    "fusion_three_experts": "MagicFusion - three models",
    "mixer_two_pictures": "Image Mixer - two pictures become one",
    "mixer_picture_words": "Image Mixer - a picture and words",
    "mixer_crops": "Image Mixer - parts of a picture",
    "metrics_two_merges": "Evaluate - metrics of two merges",
    "sweep_grid": "Evaluate - two settings as a grid",
    "sweep_strip": "Evaluate - a strip of token scales",
    "token_scale_z_image": "Token Scale - scale a word on Z-Image",
    "token_scale_klein": "Token Scale - scale a word on Flux2 Klein",
    "layout_z_image": "MagicMix - layout of a picture on Z-Image",
    "layout_flux": "MagicMix - layout of a picture on Flux",
    "layout_qwen": "MagicMix - layout of a picture on Qwen-Image",
    "cocktail_flux": "Cocktail - a photo in another style on Flux",
    "regions_z_image": "Dual Style - a prompt for each region on Z-Image",
    "regions_flux": "Dual Style - a prompt for each region on Flux",
    "regions_qwen": "Dual Style - a prompt for each region on Qwen-Image",
}
DEMOS = ("magicmix_image_text", "concept_removal", "token_scale", "dual_style_epsilon", "dual_style_attention",
         "restyle_photo", "cocktail_checkpoints", "fusion_checkpoints", "mixer_two_pictures",
         "metrics_two_merges", "sweep_grid", "sweep_strip")
PICTURES = {  # templates for one family of models, and the one of the same technique on the demo checkpoint
    "token_scale_z_image": "token_scale", "token_scale_klein": "token_scale",
    "layout_z_image": "magicmix_image_text", "layout_flux": "magicmix_image_text",
    "layout_qwen": "magicmix_image_text", "cocktail_flux": "cocktail_photo",
    "regions_z_image": "dual_style_attention", "regions_flux": "dual_style_attention",
    "regions_qwen": "dual_style_attention",
}
MODERN = tuple(PICTURES)
ALL = (*TITLES, *(name + DEMO for name in DEMOS))


def title(name: str) -> str:
    """A template's title by its short name; `_demo` at its end is the one that needs no file."""
    return TITLES[name.removesuffix(DEMO)] + (NO_DOWNLOAD if name.endswith(DEMO) else "")


def template_path(name: str) -> Path:
    return WORKFLOWS / f"{title(name)}.json"
