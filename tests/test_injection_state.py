"""Feature Injection beside nodes that keep state between calls of the model, and what it waits for at a step."""
from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from families import FAMILIES, raise_norms
from injection_rig import guide, inject_explicitly, invert, run
from mixology.host.injection import inject_features
from torch import Tensor
from torch.overrides import TorchFunctionMode

SOURCE, POSITIVE, NEGATIVE = (tiny.conditioning(seed) for seed in (3, 1, 2))
BLOCKS = [("output", 1), ("output", 2), ("output", 3)]
TOLERANCE = 2e-5
EFFECT = 100 * TOLERANCE


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


@pytest.fixture(scope="module")
def trajectory(model: Any) -> Any:
    return invert(model, SOURCE, tiny.latent(1, 8, 8), 8)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def cache_steps(node: Any) -> Callable[[Any], Any]:
    return lambda model: node.execute(model, 3.0, 0.1, 1.0, False).result[0]


class Momentum:
    """What a node puts into the options: the picture's values of the call before."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}


def with_state_in_options(model: Any) -> Any:
    """A patch that adds a share of what it saw in the call before."""
    def push(n: Tensor, options: dict[str, Any]) -> Tensor:
        held, name = options["momentum"].before, str((options["block"], options["block_index"]))
        before, held[name] = held.get(name, n), n
        return n + 0.3 * (n - before)

    clone = model.clone()
    clone.model_options["transformer_options"]["momentum"] = Momentum()
    clone.set_model_attn1_output_patch(push)
    return clone


def with_state_around_the_network(model: Any) -> Any:
    """A wrapper that adds a share of what the network predicted in the call before."""
    held: list[Tensor] = []

    def push(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        out = executor(*args, **kwargs)
        before = held[-1] if held else out
        held[:] = [out]
        return out + 0.3 * (out - before)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "momentum", push)
    return clone


def with_count_of_calls(model: Any) -> Any:
    """A wrapper around the prompts that changes every second step's."""
    steps: list[int] = []

    def count(executor: Any, model: Any, conds: Any, x: Tensor, *rest: Any) -> Any:
        steps.append(len(x))
        return executor(model, conds, x * (1.0 if len(steps) % 2 else 0.9), *rest)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "count", count)
    return clone


@pytest.mark.parametrize("keep", [cache_steps(EasyCacheNode), cache_steps(LazyCacheNode),
                                  with_state_around_the_network, with_count_of_calls],
                         ids=["EasyCache", "LazyCache", "around the network", "around the prompts"])
def test_state_is_the_targets_alone(model: Any, trajectory: Any, keep: Any) -> None:
    """As with another instance of the network to read the source, of which the other node knows nothing."""
    reader = raise_norms(tiny.unet())
    expected = run(guide(keep(inject_explicitly(
        model, trajectory, SOURCE, 0.5, 0.8, BLOCKS, reader=reader)), POSITIVE, NEGATIVE), trajectory)
    plain = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory)
    for first in (True, False):  # a node that keeps its state as long as the MODEL does is made anew
        patched = (inject_features(keep(model), trajectory, SOURCE, 0.5, 0.8) if first
                   else keep(inject_features(model, trajectory, SOURCE, 0.5, 0.8)))
        assert distance(run(guide(patched, POSITIVE, NEGATIVE), trajectory), expected) < TOLERANCE
    assert distance(expected, plain) > EFFECT, "the other node did nothing"


def test_state_in_options_is_each_readings_own(model: Any, trajectory: Any) -> None:
    """The source has what it kept of the source; it stays in the run, and the node's own object is not touched."""
    stateful = with_state_in_options(model)
    reader = with_state_in_options(raise_norms(tiny.unet()))
    own = reader.model_options["transformer_options"]
    # the other instance, with the other node's patch on it
    called, network = reader.model.apply_model, reader.model.diffusion_model
    other = SimpleNamespace(model=SimpleNamespace(
        diffusion_model=network,
        apply_model=lambda *args, **kwargs: called(*args, **{**kwargs, "transformer_options": own})))
    explicit = inject_explicitly(stateful, trajectory, SOURCE, 1.0, 1.0, BLOCKS, reader=other)
    expected = run(guide(explicit, POSITIVE, NEGATIVE, 1.0), trajectory)
    stateful = with_state_in_options(model)
    injecting = inject_features(stateful, trajectory, SOURCE, 1.0, 1.0)
    ours = run(guide(injecting, POSITIVE, NEGATIVE, 1.0), trajectory)
    assert distance(ours, expected) < TOLERANCE
    plain = run(guide(inject_features(model, trajectory, SOURCE, 1.0, 1.0), POSITIVE, NEGATIVE, 1.0), trajectory)
    assert distance(ours, plain) > EFFECT
    held = stateful.model_options["transformer_options"]["momentum"].before
    assert held and all(len(tensor) == 1 for tensor in held.values())


@pytest.mark.parametrize("until", [0.0001, 0.6], ids=["not injecting", "injecting"])
def test_what_is_noted_in_the_options_lasts_through_the_run(model: Any, trajectory: Any, until: float) -> None:
    """By a wrapper below this pack's, in the options that it is given."""
    def note(executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> Any:
        options = model_options["transformer_options"]
        options["seen"] = [*options.get("seen", []), float(timestep[0])]
        seen.append(len(options["seen"]))
        return executor(model, conds, x, timestep, model_options)

    seen: list[int] = []
    noting = inject_features(model, trajectory, SOURCE, until, 0.0)
    noting.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "note", note)
    run(guide(noting, POSITIVE, NEGATIVE), trajectory)
    assert seen == list(range(1, len(trajectory.sigmas)))


@pytest.mark.parametrize("until", [0.0001, 0.6], ids=["not injecting", "injecting"])
def test_the_network_never_sees_what_is_injected(model: Any, trajectory: Any, until: float) -> None:
    """One that was compiled beside an option crashes in the host once that is gone."""
    def note(executor: Any, *arguments: Any, **kwargs: Any) -> Any:
        seen.update(arguments[5])
        return executor(*arguments, **kwargs)

    seen: dict[str, Any] = {}
    noting = inject_features(model, trajectory, SOURCE, until, 0.0)
    noting.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    run(guide(noting, POSITIVE, NEGATIVE), trajectory)
    assert seen and not [key for key in seen if key.startswith("mixology")]


def test_a_node_that_skips_the_targets_is_told(model: Any, trajectory: Any) -> None:
    """Such as other packs' step caches: nothing says that what they answer with was injected."""
    def skip(executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        return x * 0

    def skip_blocks(executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        blocks = executor.class_obj.output_blocks
        kept = blocks._modules.pop("3")
        try:
            return executor(x, *rest, **more)
        finally:
            blocks._modules["3"] = kept

    for wrapper in (skip, skip_blocks):
        skipping = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
        skipping.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", wrapper)
        with pytest.raises(ValueError, match="expected the model to read the trajectory at every step, got one of"):
            run(guide(skipping, POSITIVE, NEGATIVE), trajectory)


def test_a_copy_of_a_guider(model: Any, trajectory: Any) -> None:
    guider = guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE)
    twin = copy.copy(guider)
    assert torch.equal(run(twin, trajectory), run(guider, trajectory))


class Waits(TorchFunctionMode):
    """Counts values that Python reads from a tensor, each of which waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in {
            "__float__", "__int__", "__bool__", "__index__", "item", "nonzero"}
        return func(*args, **(kwargs or {}))


def count_waits(model: Any, trajectory: Any, prompts: Any, steps: int) -> int:
    """Values read back in a step of a run, over those in a shorter one: what happens once a run cancels."""
    counts = []
    for length in (2, 2 + steps):
        sigmas = trajectory.sigmas.flip(0)[:length + 1]
        with Waits() as waits:
            run(guide(model, *prompts), trajectory, sigmas=sigmas)
        counts.append(waits.count)
    assert (counts[1] - counts[0]) % steps == 0
    return (counts[1] - counts[0]) // steps


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_one_value_is_read_back_at_a_step(name: str) -> None:
    """That of the step itself, however many injections there are; thresholds once a run."""
    family = FAMILIES[name]
    model, source = family.model(), family.conditioning(3, 7)
    prompts = [family.conditioning(seed, 11) for seed in (1, 2)]
    trajectory = invert(model, source, {"samples": family.latent(1, 8, 8)}, 6)
    plain = count_waits(model, trajectory, prompts, 3)
    once = inject_features(model, trajectory, source, 0.9, 0.9)
    twice = inject_features(once, trajectory, source, 0.8, 0.7)
    assert [count_waits(patched, trajectory, prompts, 3) - plain for patched in (once, twice)] == [1, 1]
