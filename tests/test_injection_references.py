"""Feature Injection beside reference pictures, in frames, and in Flux2's format, against an exchange by hand."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from attention_merge_rig import cell_means
from comfy import supported_models
from families import POOLED, WIDTH, flux, raise_norms
from injection_rig import OneReading, guide, in_single_chunks, inject_joint_explicitly, invert, run, soft_mask
from mixology.host.injection import inject_features
from torch import Tensor

TOLERANCE = 2e-5
EFFECT = 50  # over the difference; Flux2's 512 text tokens outweigh a tiny picture's


class TinyFlux2Config(supported_models.Flux2):
    unet_config: dict[str, Any] = {}


class TinyQwenConfig(supported_models.QwenImage):
    unet_config: dict[str, Any] = {}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux2() -> Any:
    return raise_norms(tiny.patcher_of(TinyFlux2Config({
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": WIDTH,
        "hidden_size": 32, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": True,
        "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, "txt_ids_dims": [3]}), 0))


def qwen(**options: Any) -> Any:
    return raise_norms(tiny.patcher_of(TinyQwenConfig({
        "image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
        **options}), 0))


@dataclass(frozen=True)
class Case:
    """A model, its latent's and its reference's shape, and how many of its attentions and tokens there are."""

    model: Any
    shape: tuple[int, ...]
    reference: tuple[int, ...] | None
    blocks: int
    side: int
    tokens: int = 11

    def count(self, shape: tuple[int, ...]) -> int:
        return (shape[2] if len(shape) == 5 else 1) * -(-shape[-2] // self.side) * -(-shape[-1] // self.side)

    @property
    def others(self) -> int:
        return self.count(self.reference) if self.reference else 0

    def text(self, seed: int, references: bool = True) -> list[Any]:
        options: dict[str, Any] = {"pooled_output": draw(1, POOLED, seed=seed)}
        if references and self.reference:
            options["reference_latents"] = [draw(*self.reference, seed=31)]
        return [[draw(1, self.tokens, WIDTH, seed=seed), options]]

    def trajectory(self, model: Any, source: Any) -> Any:
        return invert(model, source, {"samples": draw(*self.shape, seed=7)}, 4)

    def weight(self, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return torch.ones(self.count(self.shape))
        grid = [-(-side // self.side) for side in self.shape[-2:]]
        cells = cell_means(cell_means(mask, *self.shape[-2:]), *grid).float().flatten()
        return cells.repeat(self.count(self.shape) // len(cells))


CASES = {
    "kontext": Case(flux, (1, 16, 9, 7), (1, 16, 8, 6), 4, 2),
    "flux2": Case(flux2, (1, 128, 5, 3), None, 4, 1),
    "flux2_edit": Case(flux2, (1, 128, 5, 3), (1, 128, 4, 3), 4, 1, 40),
    "qwen_edit": Case(qwen, (1, 16, 1, 9, 7), (1, 16, 1, 8, 6), 3, 2),
    "qwen_layered": Case(qwen, (1, 16, 3, 9, 6), None, 3, 2),
}
if "default_ref_method" in __import__("inspect").signature(
        __import__("comfy.ldm.qwen_image.model", fromlist=["x"]).QwenImageTransformer2DModel).parameters:
    CASES["qwen_2511"] = Case(lambda: qwen(default_ref_method="index_timestep_zero"), (1, 16, 1, 10, 6),
                              (1, 16, 1, 8, 6), 3, 2)


@pytest.mark.parametrize("with_source", [False, True], ids=["source without", "source with"])
@pytest.mark.parametrize("name", CASES)
def test_the_pictures_own_tokens_are_exchanged(name: str, with_source: bool) -> None:
    """The source is read with the references that its own prompt has."""
    case = CASES[name]
    model, source = case.model(), case.text(3, with_source)
    trajectory, prompts = case.trajectory(model, source), [case.text(1), case.text(2)]
    for mask in (None, soft_mask()):
        explicit = inject_joint_explicitly(
            model, trajectory, source, 0.6, case.blocks, case.weight(mask), others=case.others,
            source_others=case.others if with_source else 0)
        ours, expected, plain = (run(guide(patched, *prompts), trajectory) for patched in (
            inject_features(model, trajectory, source, 0.6, 0.0, mask), explicit, model))
        difference = float((ours - expected).abs().max() / expected.std())
        assert difference < TOLERANCE
        assert float((ours - plain).abs().max() / plain.std()) > EFFECT * difference


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_own_states_change_nothing(name: str, references: bool) -> None:
    """Bit for bit, in the trajectory's own state."""
    case = CASES[name]
    model, source = case.model(), case.text(3, references)
    trajectory = case.trajectory(model, source)
    reading = OneReading(trajectory.states[-1])
    ours, plain = (run(guide(in_single_chunks(patched), source, source, 1.0), trajectory, reading)
                   for patched in (inject_features(model, trajectory, source, 1.0, 0.0), model))
    assert torch.equal(ours, plain)
