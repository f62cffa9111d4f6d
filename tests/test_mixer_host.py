"""Image Mixer in a real host: embeddings of pictures and texts, what a model makes of tokens, and every error."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from encoders import text_encoder
from families import flux
from mixer_rig import bare_text, load_text, load_two_texts, text_state, vision
from mixology.host.mixer import make_conditioning, mix_image, mix_text
from mixology.nodes.mixer import MixerConditioning, MixerImage, MixerText
from mixology.samplers.mixer import MODES, Mixer, add_source
from torch import Tensor

pytestmark = pytest.mark.seam

WHOLE = (0.0, 0.0, 1.0, 1.0)
WIDTH = 16
SIGMAS = torch.tensor([5.0, 1.0, 0.0])
TOLERANCE = 2e-4  # of states of about 50, by the order of float32 sums


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vision(tmp_path_factory.mktemp("vision"), projection_dim=WIDTH)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_text(tmp_path_factory.mktemp("text") / "clip_l.safetensors", text_state())


def pictures(count: int, height: int = 40, width: int = 56, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def embeddings(count: int, images: int = 1, width: int = WIDTH, seed: int = 0) -> Tensor:
    return 2 * torch.randn(count, images, width, generator=torch.Generator().manual_seed(seed))


def mix(sources: Tensor, strengths: list[float] | None = None) -> Mixer:
    """From embeddings [N, B, C]."""
    mixer: Mixer = ()
    for embedding, strength in zip(sources, strengths or [1.0] * len(sources)):
        mixer = add_source(mixer, embedding, strength)
    return mixer


def sample(model: Any, positive: Any, negative: Any, cfg: float = 3.0, batch: int = 1, seeds: list[int] | None = None,
           ) -> Tensor:
    latent = torch.zeros(batch, 4, 8, 8)
    noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed) for seed in seeds or [7] * batch])
    guider = tiny.cfg_guider(model, positive, negative, cfg)
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), SIGMAS.clone(), disable_pbar=True)


# ---------------------------------------------------------------------------------------------- embeddings

def test_a_picture_is_its_projected_embedding_as_the_host_has_it(tower: Any) -> None:
    """Un-normalised and in float32; the projection written out in float64 on the host's pooled state."""
    image = pictures(2)
    source, = mix_image(tower, image, 1.5, WHOLE, None)
    assert (source.embedding.dtype, source.embedding.shape, source.strength) == (torch.float32, (2, WIDTH), 1.5)
    assert torch.equal(source.embedding, tower.encode_image(image)["image_embeds"])
    network = tower.model
    pooled = network.vision_model.post_layernorm(tower.encode_image(image)["last_hidden_state"][:, 0])
    expected = pooled.double() @ network.visual_projection.weight.double().T
    torch.testing.assert_close(source.embedding.double(), expected, rtol=1e-5, atol=1e-5)
    assert (source.embedding.norm(dim=1) - 1).abs().min() > 0.05


def test_a_crop_is_the_picture_of_that_part(tower: Any) -> None:
    image = pictures(1, 40, 40)
    source, = mix_image(tower, image, 1.0, (0.25, 0.5, 0.5, 0.5), None)
    whole, = mix_image(tower, image, 1.0, WHOLE, None)
    assert torch.equal(source.embedding, tower.encode_image(image[:, 20:40, 10:30])["image_embeds"])
    assert not torch.allclose(source.embedding, whole.embedding, atol=1e-3)


def test_transparency_is_not_seen(tower: Any) -> None:
    image = pictures(1, channels=4)
    with_alpha, without = (mix_image(tower, part, 1.0, WHOLE, None)[0] for part in (image, image[..., :3]))
    assert torch.equal(with_alpha.embedding, without.embedding)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "sd3_l_t5", "sd3_g", "flux"])
def test_a_text_is_its_end_state_projected(name: str) -> None:
    """CLIP-L of encoders that have several; against the network itself and a projection in float64."""
    encoder = text_encoder(name)
    source, = mix_text(encoder, "a red tiger", -1.5, None)
    key, tower = next((part, getattr(encoder.cond_stage_model, f"clip_{part}")) for part in "lhg"
                      if getattr(encoder.cond_stage_model, f"clip_{part}", None) is not None)
    ids = [token for token, _ in encoder.tokenize("a red tiger")[key][0]]
    states = tower.transformer.text_model(torch.tensor([ids]))[0]
    end = states[0, ids.index(49407)].double()
    expected = end @ tower.transformer.text_projection.weight.double().T
    torch.testing.assert_close(source.embedding[0].double(), expected, rtol=2e-3, atol=2e-3)
    assert source.embedding.dtype == torch.float32 and source.strength == -1.5
    assert not torch.allclose(end, expected, atol=0.05)


def test_neither_clip_skip_nor_a_mix_before_changes_anything(clip: Any) -> None:
    text = "a red tiger"
    before = core.CLIPTextEncode().encode(clip, text)[0]
    plain, = mix_text(clip, text, 1.0, None)
    skipped, = mix_text(core.CLIPSetLastLayer().set_last_layer(clip, -2)[0], text, 1.0, None)
    assert torch.equal(plain.embedding, skipped.embedding)
    after = core.CLIPTextEncode().encode(clip, text)[0]
    assert torch.equal(before[0][0], after[0][0])
    assert torch.equal(before[0][1]["pooled_output"], after[0][1]["pooled_output"])
    assert not torch.allclose(before[0][1]["pooled_output"], plain.embedding, atol=0.05), "the host's is unprojected"


def test_a_lora_on_the_text_encoder_counts(clip: Any) -> None:
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    patched = clip.clone()
    shape = clip.cond_stage_model.state_dict()[key].shape
    patched.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(1)),)})
    plain, = mix_text(clip, "a red tiger", 1.0, None)
    changed, = mix_text(patched, "a red tiger", 1.0, None)
    again, = mix_text(clip, "a red tiger", 1.0, None)
    assert not torch.allclose(plain.embedding, changed.embedding, atol=1e-3)
    torch.testing.assert_close(again.embedding, plain.embedding)


# -------------------------------------------------------------------------------- what a model makes of it

def test_order_means_nothing_and_padding_does(model: Any) -> None:
    """Measured on this model, states of up to 85: order 2e-5, repeating all 2e-5; padding 1.9, repeating one 2.0,
    repeating all within five slots, where they push zeros out, 2.6."""
    sources = embeddings(3)
    straight, turned = (
        sample(model, *make_conditioning(mix(part), "concat", 5)) for part in (sources, sources.flip(0)))
    torch.testing.assert_close(straight, turned, rtol=0, atol=TOLERANCE)
    bare = sample(model, *make_conditioning(mix(sources), "concat", 0))
    assert (bare - straight).abs().max() > 0.5
    whole = mix(torch.cat([sources, sources]))
    torch.testing.assert_close(sample(model, *make_conditioning(whole, "concat", 0)), bare, rtol=0, atol=TOLERANCE)
    two = sources[:2]
    once, twice = (sample(model, *make_conditioning(mix(part), "concat", 5)) for part in (two, torch.cat([two, two])))
    assert (once - twice).abs().max() > 0.5
    doubled = mix(torch.cat([sources, sources[:1]]))
    assert (sample(model, *make_conditioning(doubled, "concat", 0)) - bare).abs().max() > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_no_strength_is_the_unconditional(model: Any, mode: str) -> None:
    positive, negative = make_conditioning(mix(embeddings(2), [0.0, 0.0]), mode, 5)
    zeros = [[torch.zeros(1, 5, WIDTH), {}]]
    assert torch.equal(sample(model, positive, negative, 7.0), sample(model, zeros, zeros, 7.0))


def test_the_negative_is_zeros_of_any_length(model: Any) -> None:
    positive, negative = make_conditioning(mix(embeddings(2)), "concat", 5)
    assert negative[0][0].shape == positive[0][0].shape and not negative[0][0].any()
    one = [[negative[0][0][:, :1], {}]]
    torch.testing.assert_close(sample(model, positive, negative), sample(model, positive, one), rtol=0, atol=TOLERANCE)


def test_a_batch_is_mixed_picture_by_picture(model: Any) -> None:
    first, second = embeddings(1, 3)[0], embeddings(1, 1, seed=1)[0]
    mixer = add_source(add_source((), first, 1.0), second, 0.5)
    together = sample(model, *make_conditioning(mixer, "concat", 5), batch=3, seeds=[1, 2, 3])
    for row in range(3):
        own = add_source(add_source((), first[row:row + 1], 1.0), second, 0.5)
        alone = sample(model, *make_conditioning(own, "concat", 5), seeds=[row + 1])
        torch.testing.assert_close(together[row:row + 1], alone, rtol=0, atol=TOLERANCE)


def test_nodes_wire_up_and_leave_their_inputs_alone(tower: Any, clip: Any, model: Any) -> None:
    for node in (MixerImage, MixerText, MixerConditioning):
        node.GET_SCHEMA()
    image = pictures(1)
    kept = image.clone()
    first, = MixerImage.execute(tower, image, 1.0, *WHOLE).result
    second, = MixerText.execute(clip, "a red tiger", 1.4, mixer=first).result
    third, = MixerImage.execute(tower, image, 0.7, 0.5, 0.5, 0.5, 0.5, mixer=second).result
    assert [len(mixer) for mixer in (first, second, third)] == [1, 2, 3]
    positive, negative = MixerConditioning.execute(third, "concat", 5, model=model).result
    expected = torch.stack([source.strength * source.embedding for source in third], dim=1)
    assert torch.equal(positive[0][0][:, :3], expected) and positive[0][0].shape == (1, 5, WIDTH)
    out = core.KSampler().sample(model, 1, 2, 3.0, "ddim", "ddim_uniform", positive, negative,
                                 {"samples": torch.zeros(1, 4, 8, 8)})[0]["samples"]
    assert torch.isfinite(out).all()
    assert torch.equal(image, kept) and torch.equal(positive[0][0][:, :3], expected)
    assert not model.patches and not model.model_options["transformer_options"].get("patches")


# -------------------------------------------------------------------------------------------------- errors

def test_a_vision_model_without_projection_is_told(tmp_path: Path) -> None:
    message = "^Mixer Image expected a CLIP vision model with its projection, got .* load a CLIP vision file"
    unfilled = vision(tmp_path, projection_dim=WIDTH)
    unfilled.model.visual_projection.weight.data = torch.zeros(WIDTH, 32)
    for broken in (unfilled, vision(tmp_path), None):
        with pytest.raises(ValueError, match=message):
            mix_image(broken, pictures(1), 1.0, WHOLE, None)


def test_a_text_encoder_without_projection_is_told(tmp_path: Path) -> None:
    """Whatever the host left in its place: the file says that it has none."""
    message = r"^Mixer Text expected a text encoder with its projection, got one without .* text_projection\.weight"
    state = text_state()
    projection = state.pop("text_projection.weight")
    for left in (torch.zeros(16, 16), torch.eye(16), projection):
        clip = load_text(tmp_path / "bare.safetensors", state)
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.data = left.clone()
        with pytest.raises(ValueError, match=message):
            mix_text(clip, "a tiger", 1.0, None)
    unknown = bare_text()
    unknown.cond_stage_model.clip_l.transformer.text_projection.weight.data = torch.zeros(16, 16)
    with pytest.raises(ValueError, match=message):
        mix_text(unknown, "a tiger", 1.0, None)


def test_each_of_two_encoders_needs_a_projection_of_its_own(tmp_path: Path) -> None:
    """CLIP-G's does not stand in for CLIP-L's, whatever the host left in its place."""
    first, second = text_state(4, 3), text_state(9, 32)
    both = load_two_texts(tmp_path, first, second)
    alone, = mix_text(both, "a tiger", 1.0, None)
    assert torch.equal(both.cond_stage_model.clip_l.transformer.text_projection.weight.float(),
                       first["text_projection.weight"]) and alone.embedding.isfinite().all()
    chance = first.pop("text_projection.weight")
    lacking = load_two_texts(tmp_path, first, second)
    lacking.cond_stage_model.clip_l.transformer.text_projection.weight.data = chance.clone()
    with pytest.raises(ValueError, match="^Mixer Text expected a text encoder with its projection, got one without"):
        mix_text(lacking, "a tiger", 1.0, None)


def test_projections_of_old_files_count(tmp_path: Path) -> None:
    """The host reads `text_projection`, transposed, too."""
    state = text_state()
    new = load_text(tmp_path / "new.safetensors", dict(state))
    state["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    old = load_text(tmp_path / "old.safetensors", state)
    first, second = (mix_text(clip, "a tiger", 1.0, None)[0] for clip in (new, old))
    assert torch.equal(first.embedding, second.embedding)


def test_other_text_encoders_and_long_texts_are_told(clip: Any) -> None:
    with pytest.raises(ValueError, match="^Mixer Text expected a CLIP text encoder, got QwenImageTEModel"):
        mix_text(text_encoder("qwen"), "a tiger", 1.0, None)
    with pytest.raises(ValueError, match="^Mixer Text expected a text encoder, got none; load a CLIP-L"):
        mix_text(None, "a tiger", 1.0, None)
    with pytest.raises(ValueError, match=r"^Mixer Text expected a text that CLIP reads at once \(75 tokens\), got one"):
        mix_text(clip, "tiger " * 90, 1.0, None)


def test_towers_of_two_widths_are_told(tower: Any, tmp_path: Path) -> None:
    mixer = mix_image(tower, pictures(1), 1.0, WHOLE, None)
    with pytest.raises(ValueError, match="^The mixer expected embeddings of one width, got 16 and 8; use the"):
        mix_image(vision(tmp_path, projection_dim=8), pictures(1), 1.0, WHOLE, mixer)


def test_models_that_cannot_read_it_are_told(model: Any) -> None:
    with pytest.raises(ValueError, match=r"expected embeddings of the model's width, 16, got 8; load the CLIP that"):
        make_conditioning(mix(embeddings(1, width=8)), "concat", 5, model)
    with pytest.raises(ValueError, match=r"expected an SD1\.x model that was trained on image embeddings, got Flux"):
        make_conditioning(mix(embeddings(1)), "concat", 5, flux())
