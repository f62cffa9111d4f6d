"""Nodes of Diffusion Cocktail's first half: a picture's way back into noise, and sampling from where it ends."""
from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..host import inversion, trajectory_file
from ..host.added_noise import warn_of_added_noise
from ..host.notices import show_text
from ..host.trajectory import end_latent, start_trajectory
from ..samplers.inversion import RULES
from .bounds import within_bounds
from .search import search_words
from .sockets import Trajectory


class BlendPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyBlendPrompts",
            display_name="Blend Prompts",
            category="mixology/cocktail",
            description="alpha times the positive minus beta times the negative, as one conditioning: the prompt that "
                        "Ditail inverts a picture with. alpha 0.5 and beta -0.5 is halfway between two prompts.",
            search_aliases=search_words("MixologyBlendPrompts"),
            inputs=[
                io.Conditioning.Input("positive", tooltip=(
                    "The prompt that is weighed with alpha. Its ControlNet, area and the like stay.")),
                io.Conditioning.Input("negative", tooltip=(
                    "The prompt that is taken away, weighed with beta. Only its words count.")),
                io.Float.Input(
                    "alpha", display_name="alpha (positive)", default=2.0, min=-20.0, max=20.0, step=0.1,
                    round=0.001, tooltip=(
                        "Weight of the positive. 1 with beta 0 is the positive itself; the paper's examples use 1 "
                        "to 8.")),
                io.Float.Input(
                    "beta", display_name="beta (negative)", default=0.5, min=-20.0, max=20.0, step=0.1,
                    round=0.001, tooltip=(
                        "How much of the negative is taken away. Large values give strange colours.")),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip=(
                "The blend, for DDIM Inversion or any sampler."))],
        )

    @classmethod
    @within_bounds
    def execute(cls, positive: Any, negative: Any, alpha: float, beta: float) -> io.NodeOutput:
        return io.NodeOutput(inversion.blend_prompts(
            positive=positive, negative=negative, alpha=alpha, beta=beta))


class Invert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyInvert",
            display_name="DDIM Inversion",
            category="mixology/cocktail",
            description="Follows a picture back into the noise that a model would draw it from, and keeps every state "
                        "on the way.",
            search_aliases=search_words("MixologyInvert"),
            inputs=[
                io.Model.Input("model", tooltip="The model that reads the picture: in Ditail the source model."),
                io.Conditioning.Input("conditioning", tooltip=(
                    "Describes the picture as it is; from Blend Prompts, or an empty prompt. No guidance acts here.")),
                io.Latent.Input("latent", tooltip="The picture or pictures, from VAE Encode."),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip=(
                    "Steps, with one evaluation each. More come back to the picture more closely. Sample with the "
                    "same number.")),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform",
                               tooltip="Noise schedule. ddim_uniform gives the paper's time steps."),
                io.Combo.Input("rule", options=list(RULES), default=RULES[0], advanced=True, tooltip=(
                    "ditail reads the model at the noise level that a step goes to: the paper's rule, and DDIM "
                    "inversion as usually published. euler reads it at the level that the step comes from.")),
            ],
            outputs=[
                Trajectory.Output(display_name="trajectory", tooltip="All states, for the nodes of this category."),
                io.Latent.Output(display_name="latent", tooltip=(
                    "The noisy end state. To sample from it use Start from Trajectory.")),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> None:
        warn_of_added_noise(output=1)  # the host asks here in every run; what it asks for never changes

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, conditioning: Any, latent: Any, steps: int, scheduler: str, rule: str,
    ) -> io.NodeOutput:
        trajectory = inversion.invert_latent(
            model=model, conditioning=conditioning, latent=latent, steps=steps, scheduler=scheduler, rule=rule)
        return io.NodeOutput(trajectory, end_latent(trajectory=trajectory))


class TrajectoryStart(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyTrajectoryStart",
            display_name="Start from Trajectory",
            category="mixology/cocktail",
            description="Makes SamplerCustomAdvanced start where an inversion ended, on the same schedule.",
            search_aliases=search_words("MixologyTrajectoryStart"),
            inputs=[Trajectory.Input("trajectory", tooltip="From DDIM Inversion or Load Trajectory.")],
            outputs=[
                io.Noise.Output(display_name="noise", tooltip=(
                    "The picture's own noise, for SamplerCustomAdvanced. Fits only with the latent beside it.")),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule of the inversion, for sampling."),
                io.Latent.Output(display_name="latent", tooltip=(
                    "The picture with its noise mask, for latent_image.")),
            ],
        )

    @classmethod
    @within_bounds
    def execute(cls, trajectory: Any) -> io.NodeOutput:
        return io.NodeOutput(*start_trajectory(trajectory=trajectory))


class SaveTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologySaveTrajectory",
            display_name="Save Trajectory",
            category="mixology/cocktail",
            description="Writes a trajectory to the output folder, so that a picture is inverted only once.",
            search_aliases=search_words("MixologySaveTrajectory"),
            inputs=[
                Trajectory.Input("trajectory", tooltip="From DDIM Inversion."),
                io.String.Input("filename_prefix", default="mixology/trajectory", tooltip=(
                    "Folder and start of the file's name in the output folder; a number is added. %date:yyyy-MM-dd% is "
                    "filled in.")),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    @within_bounds
    def execute(cls, trajectory: Any, filename_prefix: str) -> io.NodeOutput:
        saved = trajectory_file.save_trajectory(trajectory=trajectory, filename_prefix=filename_prefix)
        text = trajectory_file.describe_saved(saved=saved, trajectory=trajectory)
        show_text(text=text)
        return io.NodeOutput(ui={"trajectories": [saved], "text": [text]})


class LoadTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyLoadTrajectory",
            display_name="Load Trajectory",
            category="mixology/cocktail",
            description="Reads a trajectory that Save Trajectory wrote, bit for bit.",
            search_aliases=search_words("MixologyLoadTrajectory"),
            inputs=[io.Combo.Input("name", options=trajectory_file.list_choices(), tooltip=(
                "A file of Save Trajectory in the output folder, marked [output], or in the input folder. Refresh the "
                "list (R) after saving one."))],
            outputs=[
                Trajectory.Output(display_name="trajectory", tooltip="The trajectory as it was saved."),
                io.Latent.Output(display_name="latent", tooltip=(
                    "The noisy end state. To sample from it use Start from Trajectory.")),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None) -> bool | str:  # None is one that is connected
        return True if name is None else trajectory_file.find_fault(name) or True

    @classmethod
    def fingerprint_inputs(cls, name: Any = None) -> str | float:
        warn_of_added_noise(output=1)
        return trajectory_file.fingerprint(name)

    @classmethod
    @within_bounds
    def execute(cls, name: str) -> io.NodeOutput:
        trajectory = trajectory_file.load_trajectory(name=name)
        show_text(text=trajectory_file.describe_length(trajectory=trajectory))
        return io.NodeOutput(trajectory, end_latent(trajectory=trajectory))
