"""Feature injection in the host's UNets: where features are read and injected, and what does it around one call."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.injection import (
    FEATURES,
    Chunk,
    Part,
    Point,
    SourceRead,
    SourceTensors,
    UNetInjector,
    UNetReader,
    check_call,
)
from .families.unet import find_depths
from .marks import Row, chunk_rows

Block = tuple[tuple[str, int], Any]  # as the host names it, and its layers
HAS_FEATURES = True


def injected_blocks(network: Any) -> list[Block]:
    """The later half, rounded down, of the blocks with self-attention.

    In SD1.x and SD2.x output 4 to 11, as published; in SDXL output 1 to 5, which are alike in resolution.
    """
    blocks = [*((("input", i), block) for i, block in enumerate(network.input_blocks)),
              (("middle", 0), network.middle_block or []),
              *((("output", i), block) for i, block in enumerate(network.output_blocks))]
    found = [(name, block) for name, block in blocks if find_depths(block)]
    return found[(len(found) + 1) // 2:]


def find_points(network: Any, attention: bool, features: bool) -> list[Point]:
    """What is injected, in the network's order: features of the first injected block, attention in all of them."""
    blocks = injected_blocks(network)
    points: list[Point] = [FEATURES] if features and blocks else []
    if attention:
        points += [(*name, depth) for name, block in blocks for depth in find_depths(block)]
    return points


def features_layer(network: Any) -> Any:
    """What a residual block adds to its skip: `out_layers` of the first injected block's."""
    _, block = injected_blocks(network)[0]
    return block[0].out_layers


class UNetCall:
    """A wrapper of the network's call; the last of its kind, so that what others do there is not cut short."""

    kind = WrappersMP.DIFFUSION_MODEL

    def run(self, executor: Any, patches: Sequence[Any], hooks: Sequence[Any], arguments: Sequence[Any],
            options: dict[str, Any], kwargs: dict[str, Any]) -> Tensor:
        """Runs the call with own patches before those of other nodes, and hooks for as long as it takes."""
        listed = options.get("patches", {})
        options = {**options, "patches": {**listed, "attn1_patch": [*patches, *listed.get("attn1_patch", [])]}}
        with ExitStack() as stack:
            if hooks:
                layer = features_layer(executor.class_obj)
                for hook in hooks:
                    stack.callback(layer.register_forward_hook(hook).remove)
            return executor(*arguments, options, **kwargs)


class SourceCall(UNetCall):
    """Around a source call: fills the readings of its rows, which see `parts`, by index in the list of sources."""

    def __init__(self, network: Any, readings: Sequence[SourceTensors], parts: Sequence[Part],
                 points: Sequence[Point]):
        self.readings, self.parts, self.points = readings, parts, points

    def __call__(self, executor: Any, x: Tensor, timesteps: Any = None, context: Any = None, y: Any = None,
                 control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
        options = transformer_options or {}
        check_call(x.shape, [self.parts[index] for index in options["cond_or_uncond"]])
        reader = UNetReader([self.readings[index] for index in options["cond_or_uncond"]], self.points)
        hooks = [reader.read_features] if FEATURES in self.points else []
        try:
            return self.run(executor, [reader.read_attention], hooks, (x, timesteps, context, y, control),
                            options=options, kwargs=kwargs)
        except SourceRead:
            # nobody uses the prediction; outside this call all goes its way
            return x.new_zeros(len(x), executor.class_obj.out_channels, *x.shape[2:])


class TargetCall(UNetCall):
    """Around a target call: injects the rows it holds of each plan, one plan after another."""

    def __init__(self, network: Any, plans: Sequence[Mapping[Row, Chunk]]):
        self.plans = plans
        self.ran = False

    def __call__(self, executor: Any, x: Tensor, timesteps: Any = None, context: Any = None, y: Any = None,
                 control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
        options = transformer_options or {}
        rows = chunk_rows(options)
        injectors = [UNetInjector([plan.get(row) for row in rows]) for plan in self.plans]
        for injector in injectors:
            check_call(x.shape, injector.chunks)
        result = self.run(
            executor, [injector.inject_attention for injector in injectors],
            [injector.inject_features for injector in injectors if injector.holds(FEATURES)],
            (x, timesteps, context, y, control), options=options, kwargs=kwargs)
        for injector in injectors:
            injector.check_met()
        self.ran = True
        return result
