"""The demo checkpoint in a real host: its classes, its autoencoder and every seam other nodes use."""
from __future__ import annotations

import gc
import weakref
from typing import Any

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.hooks
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import nodes as core
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from mixology.host import demo
from mixology.nodes.demo import DemoCheckpoint, DemoPicture
from safetensors.torch import load_file

SD1_ATTENTION = (
    {("input", i) for i in (1, 2, 4, 5, 7, 8)} | {("middle", 0)} | {("output", i) for i in range(3, 12)})
CAPTION = "a striped red star on a blue background"

UNET_KEY = "diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
TEXT_KEY = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
UNET_LORA = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT_LORA = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Any) -> tuple[Any, Any, Any]:
    return checkpoints("shapes")


def weights(patcher: Any) -> State:
    return {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)


def encode(clip: Any, text: str) -> list[Any]:
    return core.CLIPTextEncode().encode(clip, text)[0]


def sample(model: Any, positive: Any, negative: Any, width: int = 16, height: int = 16, batch: int = 1) -> torch.Tensor:
    latent = {"samples": torch.zeros(batch, 4, height, width)}
    return core.common_ksampler(model, 7, 2, 3.0, "euler", "normal", positive, negative, latent)[0]["samples"]


def lora_file(seed: int = 0) -> State:
    """A LoRA with the usual names: an attention weight of the UNet and one of the text encoder, both 128 x 128."""
    g = torch.Generator().manual_seed(seed)
    state: State = {}
    for name in (UNET_LORA, TEXT_LORA):
        state[f"{name}.lora_up.weight"] = torch.randn(128, 4, generator=g)
        state[f"{name}.lora_down.weight"] = torch.randn(4, 128, generator=g)
        state[f"{name}.alpha"] = torch.tensor(4.0)
    return state


# ----------------------------------------------------------------------------------------------- the model

@pytest.mark.seam
def test_model_is_the_hosts_sd1(checkpoint: tuple[Any, Any, Any]) -> None:
    model = checkpoint[0].model
    assert type(model) is comfy.model_base.BaseModel
    assert model.model_type is comfy.model_base.ModelType.EPS
    assert model.latent_format.scale_factor == pytest.approx(0.18215)
    assert float(model.model_sampling.sigma_max) == pytest.approx(14.6146, abs=1e-3)
    assert float(model.model_sampling.sigma_min) == pytest.approx(0.0292, abs=1e-4)
    assert model.diffusion_model.num_heads == demo.read_config()["unet"]["num_heads"]
    assert {value.dtype for value in model.diffusion_model.state_dict().values()} == {torch.float32}
    assert not any(module.training for module in model.diffusion_model.modules())


@pytest.mark.seam
def test_attention_sits_where_sd1_has_it(checkpoint: tuple[Any, Any, Any]) -> None:
    model, clip, _ = checkpoint
    seen: dict[str, set[Any]] = {"attn1": set(), "attn2": set()}

    def record(name: str) -> Any:
        def patch(n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> Any:
            seen[name].add(tuple(options["block"]))
            return n, context, value
        return patch

    patched = model.clone()
    patched.set_model_attn1_patch(record("attn1"))
    patched.set_model_attn2_patch(record("attn2"))
    sample(patched, encode(clip, CAPTION), encode(clip, ""))
    assert seen == {"attn1": SD1_ATTENTION, "attn2": SD1_ATTENTION}
    unet = model.model.diffusion_model
    assert (len(unet.input_blocks), len(unet.output_blocks)) == (12, 12)


@pytest.mark.seam
def test_core_sampler_runs_on_a_wide_batch(checkpoint: tuple[Any, Any, Any]) -> None:
    model, clip, vae = checkpoint
    positive, negative = encode(clip, CAPTION), encode(clip, "")
    latent = {"samples": torch.zeros(3, 4, 16, 24)}
    out = core.KSampler().sample(model, 7, 2, 3.0, "dpmpp_2m", "karras", positive, negative, latent)[0]["samples"]
    assert out.shape == (3, 4, 16, 24)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    assert core.VAEDecode().decode(vae, {"samples": out})[0].shape == (3, 128, 192, 3)


@pytest.mark.seam
def test_prompt_reaches_the_model(checkpoint: tuple[Any, Any, Any]) -> None:
    model, clip, _ = checkpoint
    negative = encode(clip, "")
    star, ring = (sample(model, encode(clip, f"a red {shape}"), negative) for shape in ("star", "ring"))
    assert not torch.allclose(star, ring, atol=1e-3)


def test_two_loads_are_equal_and_apart(checkpoint: tuple[Any, Any, Any]) -> None:
    again = demo.load_checkpoint("shapes")
    assert equal(weights(checkpoint[0]), weights(again[0]))
    assert equal(weights(checkpoint[1].patcher), weights(again[1].patcher))
    assert equal(weights(checkpoint[2].patcher), weights(again[2].patcher))
    assert again[0].model is not checkpoint[0].model


def test_weights_are_those_of_the_files(checkpoint: tuple[Any, Any, Any]) -> None:
    file = load_file(demo.shipped_file("shapes"))
    shipped = {key.removeprefix("model."): value.float() for key, value in file.items()}
    held = {key: value for key, value in weights(checkpoint[0]).items() if key.startswith("diffusion_model.")}
    assert equal(held, shipped)


def test_memory_is_released() -> None:
    model, clip, vae = demo.load_checkpoint("shapes")
    sample(model, encode(clip, CAPTION), encode(clip, ""))
    vae.decode(torch.zeros(1, 4, 16, 16))
    alive = [weakref.ref(model.model), weakref.ref(clip.cond_stage_model), weakref.ref(vae.first_stage_model)]
    del model, clip, vae
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


@pytest.mark.seam
def test_host_can_ask_for_a_second_copy(checkpoint: tuple[Any, Any, Any]) -> None:
    """Hooks under dynamic VRAM, torch.compile and multi-GPU reload a model through this pair."""
    for patcher in (checkpoint[0], checkpoint[1].patcher, checkpoint[2].patcher):
        load, arguments = patcher.cached_patcher_init
        copy = load(*arguments, disable_dynamic=True)
        assert equal(weights(copy), weights(patcher))
        assert not copy.is_dynamic()


# --------------------------------------------------------------------------------------------------- seams

@pytest.mark.seam
def test_lora_changes_and_unpatch_restores(checkpoint: tuple[Any, Any, Any]) -> None:
    model, clip, _ = checkpoint
    plain_text = encode(clip, CAPTION)
    before, text_before = weights(model), weights(clip.patcher)
    plain = sample(model, plain_text, encode(clip, ""))
    lora = lora_file()
    patched, patched_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    assert set(patched.patches) == {UNET_KEY}
    assert set(patched_clip.patcher.patches) == {TEXT_KEY}
    assert not torch.allclose(encode(patched_clip, CAPTION)[0][0], plain_text[0][0], atol=1e-3)
    assert not torch.allclose(sample(patched, plain_text, encode(clip, "")), plain, atol=1e-4)
    expected = before[UNET_KEY] + lora[f"{UNET_LORA}.lora_up.weight"] @ lora[f"{UNET_LORA}.lora_down.weight"]
    comfy.model_management.load_models_gpu([patched])
    assert torch.allclose(weights(patched)[UNET_KEY].cpu(), expected, atol=1e-5)
    patched.detach()
    patched_clip.patcher.detach()
    assert equal(weights(model), before)
    assert equal(weights(clip.patcher), text_before)
    assert torch.equal(sample(model, encode(clip, CAPTION), encode(clip, "")), plain)


@pytest.mark.seam
def test_lora_hook_acts_on_its_own_conditioning(checkpoint: tuple[Any, Any, Any]) -> None:
    model, clip, _ = checkpoint
    positive, negative = encode(clip, CAPTION), encode(clip, "")
    plain = sample(model, positive, negative)
    hooks = comfy.hooks.create_hook_lora(lora_file(), 1.0, 1.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    assert not torch.allclose(sample(model, hooked, negative), plain, atol=1e-4)
    assert torch.equal(sample(model, positive, negative), plain)
    hooked_clip = SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=False, hooks=hooks)[0]
    assert not torch.allclose(encode(hooked_clip, CAPTION)[0][0], positive[0][0], atol=1e-3)
    assert torch.equal(encode(clip, CAPTION)[0][0], positive[0][0])


@pytest.mark.seam
def test_controlnet_steers(checkpoint: tuple[Any, Any, Any]) -> None:
    model, clip, _ = checkpoint
    unet = {**demo.read_config()["unet"], "hint_channels": 3}
    unet.pop("out_channels")
    network = comfy.cldm.cldm.ControlNet(**unet, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    g = torch.Generator().manual_seed(1)
    state = network.state_dict()
    network.load_state_dict({key: torch.randn(value.shape, generator=g) * 0.05 for key, value in state.items()})
    control = comfy.controlnet.ControlNet(
        network.train(False), load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=None)
    picture, _ = demo.draw_picture(CAPTION, 0, 128, 128)
    positive, negative = encode(clip, CAPTION), encode(clip, "")
    plain = sample(model, positive, negative)
    apply = core.ControlNetApplyAdvanced().apply_controlnet
    steered = sample(model, *apply(positive, negative, control, picture, 1.0, 0.0, 1.0))
    assert not torch.allclose(steered, plain, atol=1e-3)
    network.load_state_dict({key: torch.zeros_like(value) for key, value in state.items()})
    assert torch.allclose(sample(model, *apply(positive, negative, control, picture, 1.0, 0.0, 1.0)), plain, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- vae

@pytest.mark.seam
@pytest.mark.parametrize(("width", "height"), [(128, 128), (192, 64)])
def test_vae_keeps_a_picture(checkpoint: tuple[Any, Any, Any], width: int, height: int) -> None:
    vae = checkpoint[2]
    pictures = torch.cat([demo.draw_picture(CAPTION, seed, width, height)[0] for seed in range(3)])
    latent = vae.encode(pictures)
    assert latent.shape == (3, 4, height // 8, width // 8)
    back = vae.decode(latent)
    assert back.shape == (3, height, width, 3)
    assert back.dtype == torch.float32
    assert (back.cpu() - pictures).abs().mean() < 0.03


def test_latents_have_the_size_that_the_schedule_expects(checkpoint: tuple[Any, Any, Any]) -> None:
    model, _, vae = checkpoint
    pictures = torch.cat([demo.draw_picture("a picture", seed, 128, 128)[0] for seed in range(24)])
    latent = model.model.process_latent_in(vae.encode(pictures))
    assert 0.6 < latent.std() < 1.4
    assert latent.mean().abs() < 0.4


# --------------------------------------------------------------------------------------------------- nodes

@pytest.mark.seam
def test_checkpoint_node() -> None:
    schema = DemoCheckpoint.GET_SCHEMA()
    assert [output.io_type for output in schema.outputs] == ["MODEL", "CLIP", "VAE", "CLIP_VISION"]
    assert schema.inputs[0].options[0] == schema.inputs[0].default == "shapes"
    model, clip, vae, vision = DemoCheckpoint.execute(name="shapes").result
    assert isinstance(model.model, comfy.model_base.BaseModel)
    assert isinstance(clip, comfy.sd.CLIP)
    assert isinstance(vae, comfy.sd.VAE)
    assert isinstance(vision, comfy.clip_vision.ClipVisionModel)
    assert DemoCheckpoint.validate_inputs("shapes") is True
    assert DemoCheckpoint.validate_inputs() is True
    assert "finds no 'gone'" in str(DemoCheckpoint.validate_inputs("gone"))


@pytest.mark.seam
def test_picture_node() -> None:
    DemoPicture.GET_SCHEMA()
    image, mask = DemoPicture.execute(caption="a red square on a white background", seed=3, width=192, height=64).result
    assert (image.shape, mask.shape) == ((1, 64, 192, 3), (1, 64, 192))
    inside, outside = image[mask == 1].mean(dim=0), image[mask == 0].mean(dim=0)
    assert inside[0] > 0.7 > 0.4 > inside[2]
    assert outside.min() > 0.8
    again = DemoPicture.execute(caption="a red square on a white background", seed=3, width=192, height=64).result
    assert torch.equal(again[0], image)
    other = DemoPicture.execute(caption="a red square on a white background", seed=4, width=192, height=64).result
    assert not torch.equal(other[0], image)
    with pytest.raises(ValueError, match="Demo Picture knows shapes .* got 'zebra'"):
        DemoPicture.execute(caption="a zebra", seed=0, width=64, height=64)
