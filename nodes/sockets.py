"""Socket types that nodes of several techniques share, and the words by which all of them are found."""
from __future__ import annotations

from comfy_api.latest import io

Trajectory = io.Custom("MIXOLOGY_TRAJECTORY")
COCKTAIL = ["ditail", "diffusion cocktail", "ddim inversion", "mixology"]
