"""Whether prompts tell a reading something everywhere: what none of them covers, the host takes for zero."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import comfy.samplers
import torch

from .conds import is_active
from .marks import Conds

# What makes of a prompt something else than the whole picture at every step.
PARTIAL = {"area": "an area", "mask": "a mask", "timestep_start": "a time range", "timestep_end": "a time range",
           "strength": "a strength"}


def is_whole(cond: dict[str, Any]) -> bool:
    """Whether a prompt covers the picture wherever it is active."""
    return "area" not in cond and "mask" not in cond and 0 < cond.get("strength", 1.0) < math.inf


def find_cover(conds: Conds, like: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the host divides each place by: the sum of the prompts' weights, shaped like the latent."""
    cover = torch.zeros_like(like)
    for cond in conds:
        found = comfy.samplers.get_area_and_mult(cond, like, timestep)
        if found is None:
            continue
        place, dims = cover, len(found.area or ()) // 2
        for i in range(dims):
            place = place.narrow(i + 2, found.area[i + dims], found.area[i])
        place += found.mult
    return cover


def check_coverage(conds: Conds, like: torch.Tensor, sigmas: Iterable[torch.Tensor], name: str) -> None:
    """Raises ValueError if prompts, made ready for sampling, leave a part of the picture unread at one of the sigmas.

    Args:
        like: the latent, [B, C, ...].
        name: the prompt and its node, for the message.
    """
    whole = [cond for cond in conds if is_whole(cond)]
    for sigma in sigmas:
        timestep = sigma * like.new_ones([len(like)])
        if is_active(whole, timestep) or bool((find_cover(conds, like, timestep).abs() > 0).all()):
            continue
        causes = " and ".join(dict.fromkeys(words for key, words in PARTIAL.items() if any(key in c for c in conds)))
        raise ValueError(
            f"{name} expects to say something of the whole picture at every step, got {causes or 'a prompt'} that "
            f"leaves part of it out at sigma {float(sigma):.4g}; combine it with a prompt for the rest (Conditioning "
            f"Combine), or leave out what limits it.")
