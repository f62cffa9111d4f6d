"""Image Mixer's published checkpoints in the host's loaders: their names and widths, with random weights."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import nodes as core
import pytest
import torch
from comfy import supported_models
from mixer_rig import TEXT, State, clip_image_state, mixer_checkpoint, text_state
from mixology.host.mixer import make_conditioning, mix_text
from mixology.samplers.mixer import add_source
from safetensors.torch import save_file

TO_KEYS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
WARNING = "this model's checkpoint brings a text encoder, so it was trained on prompts"


@pytest.fixture(scope="module")
def checkpoint() -> State:
    return mixer_checkpoint()


def tokens(count: int = 2) -> Any:
    mixer: Any = ()
    for seed in range(count):
        mixer = add_source(mixer, torch.randn(1, 768, generator=torch.Generator().manual_seed(seed)), 1.0)
    return mixer


def save(path: Path, checkpoint: State, encoder: State) -> str:
    """A checkpoint's file with its model and what stands in the text encoder's place; .ckpt is the older format."""
    model = {name: value for name, value in checkpoint.items() if name.startswith("model.diffusion_model.")}
    state = {name: value.half().contiguous() for name, value in {**model, **encoder}.items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    return str(path)


def load(path: str, **options: Any) -> tuple[Any, Any]:
    """MODEL and CLIP as Load Checkpoint makes them; a text encoder at the tests' width if it is wanted."""
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=bool(options), **options)[:2]


def test_load_checkpoint_takes_model_and_vae(checkpoint: State, caplog: pytest.LogCaptureFixture) -> None:
    """The text encoder that it hands out as well is empty, and the host's log says so."""
    assert checkpoint[TO_KEYS].shape == (320, 768)
    assert checkpoint["cond_stage_model.model.visual.proj"].shape == (1024, 768)
    with caplog.at_level(logging.WARNING):
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(dict(checkpoint), embedding_directory=None)
    assert isinstance(model.model.model_config, supported_models.SD15)
    weight = model.model.state_dict()[TO_KEYS.removeprefix("model.")]
    assert torch.equal(weight.float(), checkpoint[TO_KEYS].to(weight.dtype).float())
    positive, negative = make_conditioning(tokens(), "concat", 5, model)
    latent = core.KSampler().sample(model, 1, 1, 3.0, "ddim", "ddim_uniform", positive, negative,
                                    {"samples": torch.zeros(1, 4, 8, 8)})[0]["samples"]
    assert torch.isfinite(latent).all() and latent.any()
    assert vae.decode(latent).shape == (1, 64, 64, 3)
    assert clip is not None and any("clip missing" in record.message for record in caplog.records)
    assert WARNING not in caplog.text


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_its_empty_text_encoder_is_refused(checkpoint: State, tmp_path: Path, ending: str) -> None:
    """The file has a `text_projection`, but not where the host would read it."""
    encoder = {name: value for name, value in clip_image_state(1).items() if "token_embedding" not in name}
    path = save(tmp_path / f"image-mixer.{ending}", checkpoint, encoder)
    _, clip = load(path, te_model_options={"clip_l_model_config": dict(TEXT)})
    projection = clip.cond_stage_model.clip_l.transformer.text_projection
    projection.weight.data = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))  # as memory may hold
    with pytest.raises(ValueError, match="^Mixer Text expected a text encoder with its projection, got one without"):
        mix_text(clip, "a tiger", 1.0, None)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_checkpoint_for_prompts_is_warned_of(
    checkpoint: State, tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str,
) -> None:
    """Its model has the right width, so only what stands beside it in the file tells, which is not read in the
    older format; its CLIP has no projection."""
    text = {f"cond_stage_model.transformer.{name}": value for name, value in text_state().items()}
    model, clip = load(save(tmp_path / f"sd15.{ending}", checkpoint, text),
                       te_model_options={"clip_l_model_config": dict(TEXT)})
    with caplog.at_level(logging.WARNING):
        make_conditioning(tokens(), "concat", 5)
        assert WARNING not in caplog.text
        make_conditioning(tokens(), "concat", 5, model)
    assert caplog.text.count(WARNING) == (ending == "safetensors")
    with pytest.raises(ValueError, match=r"\(the CLIP of SD1\.x checkpoints has none\); load a CLIP-L file"):
        mix_text(clip, "a tiger", 1.0, None)


def test_a_model_beside_a_clip_image_model_or_alone_is_not_warned_of(
    checkpoint: State, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    path = save(tmp_path / "image-mixer.safetensors", checkpoint, {"cond_stage_model.model.visual.proj": torch.ones(2)})
    with caplog.at_level(logging.WARNING):
        make_conditioning(tokens(), "concat", 5, load(path)[0])
        make_conditioning(tokens(), "concat", 5, comfy.sd.load_diffusion_model(path))
    assert WARNING not in caplog.text


@pytest.mark.parametrize("beside_pictures", [False, True])
def test_sd2_names_are_a_prompt_tower_unless_a_clip_image_model_stands_there(
    checkpoint: State, tmp_path: Path, caplog: pytest.LogCaptureFixture, beside_pictures: bool,
) -> None:
    """OpenAI's CLIP has its text transformer by the name that SD2.x's text encoder has."""
    names = ["cond_stage_model.model.transformer.resblocks.0.ln_1.weight"]
    names += ["cond_stage_model.model.visual.proj"] * beside_pictures
    path = save(tmp_path / "other.safetensors", checkpoint, {name: torch.ones(2) for name in names})
    with caplog.at_level(logging.WARNING):
        make_conditioning(tokens(), "concat", 5, load(path)[0])
    assert caplog.text.count(WARNING) == (not beside_pictures)


def test_the_diffusers_folder_is_known_to_the_host() -> None:
    """Image Variations' unet folder: SD1.x's own sizes under diffusers' names; detected without its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
    config = comfy.model_detection.model_config_from_diffusers_unet(unet.state_dict())
    assert isinstance(config, supported_models.SD15)
    assert config.unet_config["context_dim"] == 768
