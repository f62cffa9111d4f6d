"""What the numbers of a stored trajectory must be besides what every trajectory's are."""
from __future__ import annotations

import torch

LARGEST_INDEX = (1 << 16) - 1  # the host draws noise for every index up to a batch's last


def check_noise_mask(mask: torch.Tensor | None) -> None:
    """Raises ValueError unless a noise mask, of any type of number, lies in 0..1."""
    if mask is not None and not bool(((mask >= 0) & (mask <= 1)).all()):  # NaN is neither
        raise ValueError("its noise mask holds values outside 0 to 1")
