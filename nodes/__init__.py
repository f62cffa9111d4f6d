"""The nodes, by technique."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention_merge import AttentionMerge
from .cycle import CycleSampler
from .demo import DemoCheckpoint, DemoPicture
from .layout import LayoutFromPrompt, LayoutMixKSampler, LayoutMixSampler, LayoutNoise
from .spatial import EpsilonMergeGuider, GradientMask
from .token_scale import TokenScale


class MixologyExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LayoutNoise, LayoutFromPrompt, LayoutMixSampler, LayoutMixKSampler, TokenScale, AttentionMerge,
                GradientMask, EpsilonMergeGuider, CycleSampler, DemoCheckpoint, DemoPicture]
