"""Feature Injection beside nodes that compile the network, or blocks of it: both orders, and all of it arrives."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel, skip_torch_compile_dict
from families import FAMILIES, raise_norms
from injection_rig import guide, invert, run
from mixology.host.injection import inject_features
from torch import Tensor

pytestmark = pytest.mark.wide

SOURCE, POSITIVE, NEGATIVE = (tiny.conditioning(seed) for seed in (3, 1, 2))
TOLERANCE = 2e-5
EFFECT = 100 * TOLERANCE


@pytest.fixture(scope="module", autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def as_the_host(model: Any, backend: str = "eager") -> Any:
    """TorchCompileModel with a backend that is ready at once."""
    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


def in_the_networks_place(model: Any) -> Any:
    """As other packs do: a compiled module stands where the network was."""
    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.compile(model.get_model_object("diffusion_model"), backend="eager"))
    return clone


BLOCK = "diffusion_model.output_blocks.2.1.transformer_blocks.0"


def in_a_blocks_place(model: Any) -> Any:
    clone = model.clone()
    clone.add_object_patch(BLOCK, torch.compile(model.get_model_object(BLOCK), backend="eager"))
    return clone


def block_by_block(model: Any) -> Any:
    """The host's own wrapper around parts of the network, as other packs use it."""
    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend="eager", keys=[BLOCK])
    return clone


@pytest.mark.parametrize(("compiled", "attention", "features"), [
    pytest.param(as_the_host, 0.5, 0.8, marks=pytest.mark.slow), (as_the_host, 0.0, 1.0), (as_the_host, 1.0, 0.0),
    (in_the_networks_place, 1.0, 1.0),
    (in_a_blocks_place, 0.5, 0.8), (block_by_block, 1.0, 1.0)])
def test_compiled_unets(compiled: Any, attention: float, features: float) -> None:
    """As without compiling, in both orders; steps that inject nothing run compiled."""
    model = raise_norms(tiny.unet())
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 3)
    plain = run(guide(model, POSITIVE, NEGATIVE), trajectory)
    expected = run(guide(inject_features(model, trajectory, SOURCE, attention, features), POSITIVE, NEGATIVE),
                   trajectory)
    for patched in (inject_features(compiled(model), trajectory, SOURCE, attention, features),
                    compiled(inject_features(model, trajectory, SOURCE, attention, features))):
        assert distance(run(guide(patched, POSITIVE, NEGATIVE), trajectory), expected) < TOLERANCE
    assert distance(expected, plain) > EFFECT
    if features < 1.0 and attention < 1.0:  # steps that inject nothing were compiled, beside this pack's options
        assert distance(run(guide(patched, POSITIVE, NEGATIVE), trajectory), expected) < TOLERANCE
        assert distance(run(guide(compiled(model), POSITIVE, NEGATIVE), trajectory), plain) < TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_compiled_transformers(name: str) -> None:
    family = FAMILIES[name]
    model, source = family.model(), family.conditioning(3, 7)
    trajectory = invert(model, source, {"samples": family.latent(1, 9, 7)}, 3)
    prompts = [family.conditioning(seed, 11) for seed in (1, 2)]
    expected = run(guide(inject_features(model, trajectory, source, 1.0, 0.0), *prompts), trajectory)
    for patched in (inject_features(as_the_host(model), trajectory, source, 1.0, 0.0),
                    as_the_host(inject_features(model, trajectory, source, 1.0, 0.0)),
                    in_the_networks_place(inject_features(model, trajectory, source, 1.0, 0.0))):
        assert distance(run(guide(patched, *prompts), trajectory), expected) < TOLERANCE
    assert distance(expected, run(guide(model, *prompts), trajectory)) > EFFECT


@pytest.mark.slow
def test_the_hosts_node() -> None:
    """Inductor needs a C++ compiler."""
    model = raise_norms(tiny.unet())
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 3)
    expected = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.6), POSITIVE, NEGATIVE), trajectory)
    for patched in (
        inject_features(TorchCompileModel.execute(model, "inductor").result[0], trajectory, SOURCE, 0.5, 0.6),
        TorchCompileModel.execute(inject_features(model, trajectory, SOURCE, 0.5, 0.6), "inductor").result[0],
    ):
        assert distance(run(guide(patched, POSITIVE, NEGATIVE), trajectory), expected) < 10 * TOLERANCE
