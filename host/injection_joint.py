"""Feature injection in the host's diffusion transformers, where text and picture share one sequence of tokens."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.injection import (
    Chunk,
    Injector,
    JointCall,
    Point,
    Reading,
    make_joint_injector,
    make_joint_reader,
)
from .marks import Row, chunk_rows
from .token_scale import JOINT, OVERRIDE

FAMILY = JOINT
HAS_FEATURES = False


def find_points(network: Any, attention: bool, features: bool) -> list[Point]:
    """The later half, rounded down, of the joint attentions; there are no residual features."""
    if isinstance(network, MMDiT):
        blocks = len(network.joint_blocks)
    elif isinstance(network, Flux):
        blocks = len(network.double_blocks) + len(network.single_blocks)
    else:
        blocks = len(network.transformer_blocks)
    return [("joint", index) for index in range((blocks + 1) // 2, blocks)] if attention else []


class Around:
    """A wrapper of the model's call; the last of its kind, so that its override is around those of other nodes."""

    kind = WrappersMP.APPLY_MODEL

    def __call__(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                 control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        options = transformer_options or {}
        side = executor.class_obj.diffusion_model.patch_size
        call = JointCall(c_crossattn.shape[1], (-(-x.shape[-2] // side), -(-x.shape[-1] // side)))
        return executor(x, t, c_concat, c_crossattn, control, {**options, OVERRIDE: self.make(call, options)}, **kwargs)

    def make(self, call: JointCall, options: dict[str, Any]) -> Any:
        raise NotImplementedError


class Read(Around):
    """Around a source call: fills the readings of its rows, by their index in the list of sources."""

    def __init__(self, readings: Sequence[Reading], points: Sequence[Point]):
        self.readings, self.points = readings, points

    def make(self, call: JointCall, options: dict[str, Any]) -> Any:
        readings = [self.readings[index] for index in options["cond_or_uncond"]]
        return make_joint_reader(call, readings, self.points, options.get(OVERRIDE))


class Inject(Around):
    """Around a target call: injects the rows it holds of each plan, one plan after another."""

    def __init__(self, plans: Sequence[Mapping[Row, Chunk]]):
        self.plans = plans

    def make(self, call: JointCall, options: dict[str, Any]) -> Any:
        rows = chunk_rows(options)
        return make_joint_injector(
            call, [Injector([plan.get(row) for row in rows]) for plan in self.plans], options.get(OVERRIDE))
