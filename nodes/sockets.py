"""Socket types that nodes of several techniques share."""
from __future__ import annotations

from comfy_api.latest import io

Trajectory = io.Custom("MIXOLOGY_TRAJECTORY")
