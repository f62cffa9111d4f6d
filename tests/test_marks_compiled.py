"""Marked prompts on a network compiled by the host's own node; what a windowed scale costs a step."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import comfy.samplers
import pytest
import tiny
import torch
from attention_merge_rig import merge, sample, soft_masks
from comfy_extras.nodes_torch_compile import TorchCompileModel
from families import FAMILIES, PECULIAR, UNET, raise_norms
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import mark_conditioning
from mixology.host.networks import family_name, find_network
from mixology.host.spatial import EpsilonMergeGuider
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.wide

TEXT, OTHER, NEGATIVE = (tiny.conditioning(seed) for seed in (1, 3, 2))


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def inductor(*case: Any) -> Any:
    return pytest.param(*case, marks=[
        pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler on this machine")])


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: str) -> Any:
    return TorchCompileModel.execute(model, backend).result[0]


def marked(technique: str, model: Any, window: tuple[float, float]) -> tuple[Any, Any]:
    if technique == "merge":
        return merge(model, soft_masks(2), TEXT, OTHER)
    factors = torch.ones(1, 77)
    factors[:, 3:7] = -1.5
    return patch_model(model), mark_conditioning(TEXT, SCALE_KEY, TokenScale(factors, *window))


def unet() -> Any:
    """One level: tracing takes most of the time."""
    return raise_norms(tiny.patcher_of(tiny.TinyUNetConfig({
        **UNET, "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
        "transformer_depth_output": [1, 1], "transformer_depth_middle": 1, "context_dim": 16,
    }), 0))


@pytest.mark.parametrize(("technique", "window", "backend", "first"), [
    ("scale", (0.4, 1.0), "eager", True), slow("merge", (0.0, 1.0), "eager", False),
    slow("scale", (0.0, 1.0), "eager", False), slow("merge", (0.0, 1.0), "eager", True),
    inductor("scale", (0.4, 1.0), "inductor", False)])
def test_a_compiled_network_has_the_same_effect(technique: str, window: tuple[float, float], backend: str, first: bool,
                                                ) -> None:
    """In either order of the nodes, also after and before a run without a mark through the same network."""
    model = unet()
    patched, positive = marked(technique, model, window)
    expected, plain = (sample(tiny.cfg_guider(patched, prompt, NEGATIVE)) for prompt in (positive, TEXT))
    both = marked(technique, compiled(model, backend), window)[0] if first else compiled(patched, backend)
    for _ in range(2):
        for prompt, result in ((TEXT, plain), (positive, expected)):
            ours = sample(tiny.cfg_guider(both, prompt, NEGATIVE))
            torch.testing.assert_close(ours, result, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)


@pytest.mark.slow
def test_a_compiled_transformer() -> None:
    """Where the attention's override is the seam; the network as other packs put it in place for good."""
    family = FAMILIES["flux"]
    model, positive, negative = family.model(), family.conditioning(1, 11), family.conditioning(2, 11)
    scale = mark_conditioning(positive, SCALE_KEY, TokenScale(torch.tensor([[1.0] * 5 + [-1.0] * 6]), 0.0, 1.0))

    def draw(model: Any) -> Tensor:
        latent = family.latent(1, 6, 4)
        return tiny.cfg_guider(model, scale, negative).sample(
            latent, latent, comfy.samplers.sampler_object("euler"), tiny.sigmas_of(model, "simple", 2),
            disable_pbar=True, seed=0)

    expected = draw(patch_model(model))
    torch.testing.assert_close(draw(patch_model(compiled(model, "eager"))), expected, rtol=1e-4, atol=1e-4)
    network = model.model.diffusion_model
    model.model.diffusion_model = torch.compile(network, backend="eager")
    assert find_network(model.model) is network
    torch.testing.assert_close(draw(patch_model(model)), expected, rtol=1e-4, atol=1e-4)


class Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("technique", ["scale", "merge"])
def test_a_windowed_scale_reads_no_value_back_at_a_step(technique: str) -> None:
    """What it asks for in a run does not grow with the steps."""
    model = raise_norms(tiny.unet())
    patched, scaled = marked("scale", model, (0.2, 0.7))
    positive = scaled
    if technique == "merge":
        patched, positive = merge(model, soft_masks(2), OTHER, scaled)
    asked = []
    for steps in (4, 9):
        counts = []
        for prompt in (positive, OTHER):
            with Reads() as reads:
                sample(tiny.cfg_guider(patched, prompt, NEGATIVE), steps=steps)
            counts.append(reads.count)
        asked.append(counts[0] - counts[1])
    assert asked[0] == asked[1]


@pytest.mark.parametrize(("make", "name"), [
    (FAMILIES["sd1"].model, "SD1.x"), (FAMILIES["qwen"].model, "Qwen-Image"), (PECULIAR["flux2"].model, "Flux.2"),
    (PECULIAR["upscaler"].model, "SD x4 Upscaler"), (tiny.video, "Wan 2.1")])
def test_models_have_the_names_that_people_know(make: Any, name: str) -> None:
    assert family_name(make().model) == name


def test_an_unknown_model_has_its_class_s_name() -> None:
    assert family_name(object()) == "object"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["scale", "merge", "epsilon"])
def test_a_compiled_network_asks_for_none_of_our_keys(first: str) -> None:
    """What was traced beside a key of ours would miss it in a run without."""
    model = compiled(unet(), "eager")
    if first == "epsilon":
        styles = {"positive_0": TEXT, "positive_1": OTHER}
        guider: Any = EpsilonMergeGuider(model, soft_masks(2), styles, NEGATIVE, 3.0)
    else:
        guider = tiny.cfg_guider(marked(first, model, (0.0, 1.0))[0], TEXT, NEGATIVE)
    sample(guider)
    pair = [TEXT[0], OTHER[0]]  # three rows, as the guider's
    for positive in (TEXT, pair):
        sample(tiny.cfg_guider(model, positive, NEGATIVE))
