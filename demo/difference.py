"""Low-rank differences: how the further demo checkpoints are stored beside the one they were taught from."""
from __future__ import annotations

from collections.abc import Mapping

import torch

DOWN, UP = ".down", ".up"

Shapes = dict[str, tuple[int, ...]]


def is_difference(tensors: Mapping[str, object]) -> bool:
    return any(name.endswith(DOWN) for name in tensors)


def combined_shapes(base: Shapes, difference: Shapes) -> Shapes:
    """Names and shapes of the weights that a difference makes of `base`; other than base's if it does not fit."""
    found = dict(base)
    for name, shape in difference.items():
        weight, _, part = name.rpartition(".")
        if f".{part}" == DOWN:
            found[weight] = (*difference.get(weight + UP, ())[:1], *shape[1:])
    return found


def add_difference(base: Mapping[str, torch.Tensor], difference: Mapping[str, torch.Tensor],
                   ) -> dict[str, torch.Tensor]:
    """W + up @ down for every weight [out, ...] that has an up [out, rank] and a down [rank, ...]."""
    return {
        name: weight + (difference[name + UP] @ difference[name + DOWN].flatten(1)).view_as(weight)
        if name + DOWN in difference else weight
        for name, weight in base.items()
    }
