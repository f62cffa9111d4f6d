"""Feature injection in the host's diffusion transformers, where text and picture share one sequence of tokens."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrappersMP

from ..attention_patches.injection import (
    Chunk,
    Injector,
    JointCall,
    Part,
    Point,
    Reading,
    check_call,
    make_joint_injector,
    make_joint_reader,
)
from .marks import Row, chunk_rows
from .token_scale import JOINT, OVERRIDE

FAMILY = JOINT
HAS_FEATURES = False
# The arguments that a wrapper around a call gets in order; those in question go by the names of the first line.
MODEL = ("x", "t", "c_concat", "context", "control", "transformer_options")  # BaseModel.apply_model
FLUX = ("x", "timestep", "context", "y", "guidance", "ref_latents", "control", "transformer_options")
QWEN = ("x", "timestep", "context", "attention_mask", "ref_latents", "additional_t_cond", "transformer_options")
NAMES = {Flux: FLUX, QwenImageTransformer2DModel: QWEN}


def find_points(network: Any, attention: bool, features: bool) -> list[Point]:
    """The later half, rounded down, of the joint attentions; there are no residual features."""
    if isinstance(network, MMDiT):
        blocks = len(network.joint_blocks)
    elif isinstance(network, Flux):
        blocks = len(network.double_blocks) + len(network.single_blocks)
    else:
        blocks = len(network.transformer_blocks)
    return [("joint", index) for index in range((blocks + 1) // 2, blocks)] if attention else []


def count_tokens(latent: Any, side: int) -> tuple[int, int, int]:
    """Frames of a latent [B, C, (T,) H, W], and tokens of `side` pixels down and across, the last ones padded."""
    height, width = latent.shape[-2:]
    return latent.shape[2] if latent.ndim == 5 else 1, -(-height // side), -(-width // side)


class Around:
    """A wrapper of a call, the last of its kind, so that its override is around those of other nodes.

    Around the network where that has such a place: the text is there as long as its tokens, and references are seen.
    """

    def __init__(self, network: Any):
        self.names = next((names for kind, names in NAMES.items() if isinstance(network, kind)), MODEL)
        self.kind = WrappersMP.APPLY_MODEL if self.names is MODEL else WrappersMP.DIFFUSION_MODEL
        self.side = network.patch_size

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.names is MODEL and "c_crossattn" in kwargs:
            kwargs["context"] = kwargs.pop("c_crossattn")
        given = {**dict(zip(self.names, args)), **kwargs}
        options, frames, *grid = given["transformer_options"] or {}, *count_tokens(given["x"], self.side)
        others = sum(math.prod(count_tokens(latent, self.side)) for latent in given.get("ref_latents") or [])
        call = JointCall(given["context"].shape[1], (grid[0], grid[1]), frames, others)
        override, injectors = self.make(call, options, given["x"].shape)
        given["transformer_options"] = {**options, OVERRIDE: override}
        ordered = [given.pop(name, None) for name in self.names]
        result = executor(*ordered, **given)
        self.end(injectors)
        return result

    def make(self, call: JointCall, options: dict[str, Any], shape: Sequence[int]) -> tuple[Any, list[Injector]]:
        """The override for a call that sees a latent of this shape, and what it injects. Calls may run in threads."""
        raise NotImplementedError

    def end(self, injectors: Sequence[Injector]) -> None:
        """After the call."""


class Read(Around):
    """Around a source call: fills the readings of its rows, which see `parts`, by index in the list of sources."""

    def __init__(self, network: Any, readings: Sequence[Reading], parts: Sequence[Part], points: Sequence[Point]):
        super().__init__(network)
        self.readings, self.parts, self.points = readings, parts, points

    def make(self, call: JointCall, options: dict[str, Any], shape: Sequence[int]) -> tuple[Any, list[Injector]]:
        rows = options["cond_or_uncond"]
        check_call(shape, [self.parts[index] for index in rows])
        readings = [self.readings[index] for index in rows]
        return make_joint_reader(call, readings, self.points, options.get(OVERRIDE)), []


class Inject(Around):
    """Around a target call: injects the rows it holds of each plan, one plan after another."""

    def __init__(self, network: Any, plans: Sequence[Mapping[Row, Chunk]]):
        super().__init__(network)
        self.plans = plans
        self.ran = False

    def make(self, call: JointCall, options: dict[str, Any], shape: Sequence[int]) -> tuple[Any, list[Injector]]:
        rows = chunk_rows(options)
        injectors = [Injector([plan.get(row) for row in rows]) for plan in self.plans]
        for injector in injectors:
            check_call(shape, injector.chunks)
        return make_joint_injector(call, injectors, options.get(OVERRIDE)), injectors

    def end(self, injectors: Sequence[Injector]) -> None:
        for injector in injectors:
            injector.check_met()
        self.ran = True
