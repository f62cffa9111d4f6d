"""The CycleDiffusion node: restyle a picture under any guider."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import cycle
from .bounds import within_bounds
from .search import search_words


class CycleSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyCycleSampler",
            display_name="Cycle Sampler (CycleDiffusion)",
            category="mixology/spatial",
            description="Restyles a picture: what the source prompt says of it is exchanged for what the guider says, "
                        "the rest stays. For SamplerCustomAdvanced with any guider and the picture as latent.",
            search_aliases=search_words("MixologyCycleSampler"),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip=(
                    "Source prompt: describes the picture as it is. The guider's prompts say what it shall become.")),
                io.Float.Input(
                    "source_cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, advanced=True, tooltip=(
                        "Guidance scale with which the picture is read. 1 is the paper's and costs one evaluation a "
                        "step; any other needs negative and costs two.")),
                io.Float.Input(
                    "eta", display_name="eta (fresh noise)", default=0.1, min=0.0, max=1.0, step=0.01, tooltip=(
                        "Fresh noise at each step, the same for both readings: 0 none, 0.1 the paper's, 1 as much "
                        "as DDPM.")),
                io.Int.Input("skip", display_name="skip (first sigmas)", default=0, min=0, max=10000, tooltip=(
                    "Sigmas dropped from the start of the schedule. More keeps more of the picture and costs less.")),
                io.Conditioning.Input("negative", optional=True, tooltip=(
                    "Negative of the source prompt. Needed when source_cfg is not 1.")),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip=(
                "For SamplerCustomAdvanced, with the encoded picture as latent_image."))],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, conditioning: Any, source_cfg: float, eta: float, skip: int, negative: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(cycle.CycleSampler(
            conditioning=conditioning, source_cfg=source_cfg, eta=eta, skip=skip, negative=negative))
