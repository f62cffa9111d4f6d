"""The tiny families: each is the host's own, gives numbers, and hears its prompt."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import tiny
import torch
from families import FAMILIES, MODERN, PECULIAR, Family
from torch import Tensor

pytestmark = pytest.mark.seam

ALL = {**FAMILIES, **PECULIAR, **MODERN}


def sample(family: Family, model: Any, positive: list[Any], batch: int = 2) -> Tensor:
    latent = family.latent(batch, *family.size)
    guider = tiny.cfg_guider(model, positive, family.conditioning(2))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), tiny.sigmas_of(model, "simple", 2),
                         disable_pbar=True, seed=0)


@pytest.mark.parametrize("name", ALL)
def test_the_prompt_matters(name: str) -> None:
    family = ALL[name]
    if family.is_missing():
        pytest.skip(f"this host has no {family.kind}")
    model = family.model()
    one, other = (sample(family, model, family.conditioning(seed)) for seed in (1, 3))
    assert one.isfinite().all() and other.isfinite().all()
    assert float((one - other).abs().max()) > 0.01 * float(one.std())
