"""The networks of LPIPS (Zhang et al., arXiv 1801.03924), version 0.1: VGG16 and AlexNet up to their last convolution.

Tensors are found by their published names, whichever file they stand in: torchvision's `features.N.weight` or the lpips
package's `net.slice1.N.weight` for a network, and `lin0.model.1.weight` for how much each channel counts.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..samplers.wording import format_size

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trunk:
    """A network up to its last convolution.

    Attributes:
        convolutions: number in the published network, of the convolutions between two poolings or reads.
        pooled: stages that begin with a pooling.
        pool: side of it; its step is 2.
        first: step and padding of the first convolution.
        widths: channels of each stage's last map.
        smallest: side of a picture that leaves something of the last map.
    """

    name: str
    convolutions: tuple[tuple[int, ...], ...]
    pooled: tuple[int, ...]
    pool: int
    first: tuple[int, int]
    widths: tuple[int, ...]
    smallest: int


TRUNKS = (
    Trunk(name="VGG16", convolutions=((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), pooled=(1, 2, 3, 4),
          pool=2, first=(1, 1), widths=(64, 128, 256, 512, 512), smallest=16),
    Trunk(name="AlexNet", convolutions=((0,), (3,), (6,), (8,), (10,)), pooled=(1, 2), pool=3, first=(4, 2),
          widths=(64, 192, 384, 256, 256), smallest=31),
)


@dataclass(frozen=True)
class Network:
    """A trunk with its weights and with how much each channel of each stage counts, [C]."""

    trunk: Trunk
    convolutions: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    weights: tuple[torch.Tensor, ...]


def read_convolution(name: str) -> tuple[int, str] | None:
    """Number of a convolution and what of it a tensor is, by its name; None of other tensors."""
    *_, part, number, kind = ("", "", *name.split("."))
    known = part == "features" or (part.startswith("slice") and part[5:].isdigit())
    return (int(number), kind) if known and number.isdigit() and kind in ("weight", "bias") else None


def read_stage(name: str) -> int | None:
    """The stage whose channels a tensor weighs, by its name; None of other tensors."""
    if not name.endswith(".model.1.weight"):
        return None
    stage = name.removesuffix(".model.1.weight").split(".")[-1]
    stage = stage.removeprefix("lin")
    return int(stage) if stage.isdigit() else None


def find_trunk(state: State) -> tuple[Trunk, dict[int, tuple[torch.Tensor, torch.Tensor]]] | None:
    """The network in a file, and its convolutions' weights and biases by number; None if it holds neither."""
    found = {key: value for name, value in state.items() if (key := read_convolution(name)) is not None}
    numbers = {number for number, _ in found}
    for trunk in TRUNKS:
        expected = [number for stage in trunk.convolutions for number in stage]
        last = [found.get((stage[-1], "weight")) for stage in trunk.convolutions]
        whole = numbers == set(expected) and len(found) == 2 * len(expected)
        if whole and tuple(len(weight) for weight in last if weight is not None) == trunk.widths:
            return trunk, {number: (found[number, "weight"], found[number, "bias"]) for number in expected}
    return None


def find_weights(state: State) -> tuple[torch.Tensor, ...] | None:
    """How much each channel of each stage counts, [C_l], in a file; None if it does not tell."""
    found = {key: value.flatten() for name, value in state.items() if (key := read_stage(name)) is not None}
    return tuple(found[stage] for stage in sorted(found)) or None


def join_network(states: Iterable[State]) -> Network | str:
    """The network that files hold together, VGG16 before AlexNet; else what is missing, in a few words."""
    trunks: dict[str, tuple[Trunk, Mapping[int, tuple[torch.Tensor, torch.Tensor]]]] = {}
    weights: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}
    for state in states:
        trunk, linear = find_trunk(state), find_weights(state)
        if trunk is not None:
            trunks[trunk[0].name] = trunk
        if linear is not None:
            weights[tuple(map(len, linear))] = linear
    for known in TRUNKS:
        if known.name in trunks and known.widths in weights:
            return Network(*trunks[known.name], weights[known.widths])
    if trunks:
        return f"the linear weights of {next(known.name for known in TRUNKS if known.name in trunks)}"
    if weights:
        return next((known.name for known in TRUNKS if known.widths in weights), "a network that fits the weights")
    return "VGG16 and its linear weights"


def make_features(network: Network, device: torch.device) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """A function from pictures [B, 3, H, W] in -1..1 to one map [B, C_l, H_l, W_l] of each stage, on the device."""
    trunk = network.trunk
    layers = {number: tuple(part.to(device) for part in pair) for number, pair in network.convolutions.items()}
    shift, scale = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (SHIFT, SCALE))

    def read(pictures: torch.Tensor) -> list[torch.Tensor]:
        """Raises ValueError for pictures too small for the last map."""
        if min(pictures.shape[2:]) < trunk.smallest:
            raise ValueError(
                f"LPIPS expects pictures of at least {trunk.smallest}x{trunk.smallest} pixels for {trunk.name}, got "
                f"{format_size(reversed(pictures.shape[2:]))}; use larger pictures.")
        x, maps = pictures.to(device), []
        x = (x - shift.to(x)) / scale.to(x)
        for stage, numbers in enumerate(trunk.convolutions):
            if stage in trunk.pooled:
                x = F.max_pool2d(x, trunk.pool, 2)
            for number in numbers:
                weight, bias = (part.to(x) for part in layers[number])
                step, padding = trunk.first if number == 0 else (1, weight.shape[-1] // 2)
                x = F.conv2d(x, weight, bias, stride=step, padding=padding).relu()
            maps.append(x)
        return maps

    return read
