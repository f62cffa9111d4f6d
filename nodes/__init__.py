"""The nodes, by technique."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention_merge import AttentionMerge
from .cycle import CycleSampler
from .demo import DemoCheckpoint, DemoPicture
from .fusion import Expert, SaliencyGuider, SaliencyMaps
from .injection import CocktailKSampler, FeatureInjection
from .inversion import BlendPrompts, Invert, LoadTrajectory, SaveTrajectory, TrajectoryStart
from .layout import LayoutFromPrompt, LayoutMixKSampler, LayoutMixSampler, LayoutNoise
from .metrics import ClipMetrics, ImageMetrics
from .mixer import MixerConditioning, MixerImage, MixerText
from .spatial import EpsilonMergeGuider, GradientMask
from .sweep import LabelledGrid, Sweep
from .token_scale import TokenScale


class MixologyExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LayoutNoise, LayoutFromPrompt, LayoutMixSampler, LayoutMixKSampler, TokenScale, AttentionMerge,
                GradientMask, EpsilonMergeGuider, CycleSampler, BlendPrompts, Invert, FeatureInjection,
                TrajectoryStart, CocktailKSampler, SaveTrajectory, LoadTrajectory, Expert, SaliencyGuider,
                SaliencyMaps, MixerImage, MixerText, MixerConditioning, ImageMetrics, ClipMetrics, Sweep,
                LabelledGrid, DemoCheckpoint, DemoPicture]
