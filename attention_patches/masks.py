"""Masks at the size of a network's layers: made once for each, since every layer asks at every step."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..samplers.masks import resize_area, resize_masks

Area = tuple[int, ...]  # height, width, y, x in latent pixels


@dataclass
class LayerMasks:
    """Masks of a picture or of each frame of a video, [N, (frames,) H, W], and what layers made of them so far.

    They live as long as the conditioning or model that holds them, so they stay where the masks are, on the CPU.
    """

    mask: Tensor
    made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def weights(self, picture: tuple[int, int], area: Area | None, layer: tuple[int, int], side: int = 0) -> Tensor:
        """The masks' means over each cell of a layer, [N, (frames,) *layer] in float32.

        Args:
            picture: height and width of the whole latent, which the masks cover.
            area: height, width, y and x of the part that the layer sees, or None for all; what lies beyond the picture
                is cut off.
            layer: cells down and across, which cover that part.
            side: of a cell in latent pixels, for layers whose last cells reach beyond the part; 0 for those that cover
                it evenly.
        """
        key = picture, area, layer, side
        if key not in self.made:
            shown = self.resize(self.mask, *picture)
            if area is not None:
                height, width, y, x = area
                shown = shown[..., y:y + height, x:x + width]
            if side:
                beyond = [cells * side - pixels for cells, pixels in zip(layer, shown.shape[-2:])]
                shown = torch.nn.functional.pad(shown, (0, beyond[1], 0, beyond[0]), mode="replicate")
            self.made[key] = self.finish(self.resize(shown, *layer))
        return self.made[key]

    def resize(self, masks: Tensor, height: int, width: int) -> Tensor:
        """[N, (frames,) H, W] at another size."""
        return resize_area(masks, height, width)

    def finish(self, cells: Tensor) -> Tensor:
        """What a layer asks for, of its cells' means [N, (frames,) *layer]."""
        return cells


class StyleMasks(LayerMasks):
    """Masks that share a picture between N styles."""

    def resize(self, masks: Tensor, height: int, width: int) -> Tensor:
        return resize_masks(masks, height, width)

    def finish(self, cells: Tensor) -> Tensor:
        """M_i / sum_(j <= i) M_j at each token, [N - 1, tokens, 1], one value for all channels of a token: the share of
        a style after the first among those up to it. Tokens of a video come frame after frame.

        Blending one style after another by these is sum_i M_i v_i, exact where all values agree.
        """
        weights = rearrange(cells, "n ... h w -> n (... h w) 1")
        shares = weights / weights.cumsum(0).clamp_min(torch.finfo(weights.dtype).tiny)
        return shares[1:]
