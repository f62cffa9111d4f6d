"""Diffusion transformers of any kind, for what asks only for the picture's tokens."""
from __future__ import annotations

from typing import Any

from .cross import CrossFamily, find_cross_network
from .joint import JointFamily, find_joint_network

# Whose attention can be told apart, UNets among them, for messages.
SUPPORTED = (
    "SD1.x, SD2.x, SDXL, SD3, Flux, Flux.2, Chroma, Qwen-Image, Z-Image, Lumina 2, Krea 2, HiDream, OmniGen2, "
    "AuraFlow, Anima, Cosmos-Predict2, Wan, LTX-Video or HunyuanVideo")


def find_transformer(network: Any) -> JointFamily | CrossFamily:
    """What a network offers; raises ValueError for one that is not known here."""
    found = find_joint_network(network) or find_cross_network(network)
    if found is None:
        raise ValueError(f"Mixology expected a diffusion transformer that it knows, got {type(network).__name__}.")
    return found
