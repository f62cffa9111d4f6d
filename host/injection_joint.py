"""Feature injection in the host's diffusion transformers, where text and picture share one sequence of tokens."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP

from ..attention_patches.injection import (
    Chunk,
    Injector,
    JointCall,
    Part,
    Point,
    SourceTensors,
    check_call,
    make_joint_injector,
    make_joint_reader,
)
from .families.joint import MODEL, count_attentions, count_picture_tokens, count_tokens, name_arguments
from .marks import Row, chunk_rows
from .networks import OVERRIDE

HAS_FEATURES = False


def find_points(network: Any, attention: bool, features: bool) -> list[Point]:
    """The later half, rounded down, of the joint attentions; there are no residual features."""
    blocks = count_attentions(network)
    return [("joint", index) for index in range((blocks + 1) // 2, blocks)] if attention else []


class TransformerCall:
    """A wrapper of a call, the last of its kind, so that its override is around those of other nodes.

    Around the network where that has such a place: the text is there as long as its tokens, and references are seen.
    """

    def __init__(self, network: Any):
        self.names = name_arguments(network)
        self.kind = WrappersMP.APPLY_MODEL if self.names is MODEL else WrappersMP.DIFFUSION_MODEL
        self.side = network.patch_size

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.names is MODEL and "c_crossattn" in kwargs:
            kwargs["context"] = kwargs.pop("c_crossattn")
        given = {**dict(zip(self.names, args)), **kwargs}
        options, frames, *grid = given["transformer_options"] or {}, *count_tokens(given["x"], self.side)
        others = count_picture_tokens(given.get("ref_latents") or [], self.side)
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


class SourceCall(TransformerCall):
    """Around a source call: fills the readings of its rows, which see `parts`, by index in the list of sources."""

    def __init__(self, network: Any, readings: Sequence[SourceTensors], parts: Sequence[Part],
                 points: Sequence[Point]):
        super().__init__(network)
        self.readings, self.parts, self.points = readings, parts, points

    def make(self, call: JointCall, options: dict[str, Any], shape: Sequence[int]) -> tuple[Any, list[Injector]]:
        rows = options["cond_or_uncond"]
        check_call(shape, [self.parts[index] for index in rows])
        readings = [self.readings[index] for index in rows]
        return make_joint_reader(call, readings, self.points, options.get(OVERRIDE)), []


class TargetCall(TransformerCall):
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
