"""Feature injection in the host's diffusion transformers, where text and picture share one sequence of tokens."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ..attention_patches.sequence import watch_blocks
from .families.transformers import find_transformer
from .marks import Row, chunk_rows
from .networks import INJECTED, OVERRIDE, SEQUENCE, NamedCall, find_network

HAS_FEATURES = False


def find_points(network: Any, attention: bool, features: bool) -> list[Point]:
    """The later half, rounded down, of the joint attentions; there are no residual features."""
    blocks = len(find_transformer(network).list_blocks(network))
    return [("joint", index) for index in range((blocks + 1) // 2, blocks)] if attention else []


class TransformerCall:
    """A wrapper of a call, the last of its kind, so that its override is around those of other nodes.

    Around the network where that has such a place: the text is there as long as its tokens, and references are seen.
    """

    def __init__(self, network: Any):
        self.family = find_transformer(network)
        self.kind = WrappersMP.DIFFUSION_MODEL if self.family.wraps else WrappersMP.APPLY_MODEL

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = NamedCall(executor, args, kwargs)
        # the one that runs: each card has a network of its own
        network = executor.class_obj if self.kind == WrappersMP.DIFFUSION_MODEL else find_network(executor.class_obj)
        options, shape = call.given["transformer_options"] or {}, call.given["x"].shape
        sequence = options.get(SEQUENCE) or self.family.sequence(network, call.given)
        positions = self.family.find_positions(network)
        with watch_blocks(self.family.list_blocks(network), positions) as running:
            override, injectors = self.make(JointCall(sequence, running), options, shape=shape)
            outside = self.kind == WrappersMP.APPLY_MODEL and bool(injectors)
            result = call.run(executor, transformer_options={**options, OVERRIDE: override, INJECTED: outside})
        self.end(injectors)
        return result

    def make(self, call: JointCall, options: dict[str, Any], shape: Sequence[int]) -> tuple[Any, list[Injector]]:
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
