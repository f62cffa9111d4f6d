"""Mixology: training-free semantic mixing for ComfyUI."""
from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Called by the host, which is only there when the pack is loaded as custom nodes."""
    from .nodes import MixologyExtension

    return MixologyExtension()
