"""Live previews of the demo checkpoints have the colours of what is decoded in the end."""
from __future__ import annotations

from typing import Any

import comfy.latent_formats
import latent_preview
import numpy
import pytest
import torch
import torch.nn.functional as F
from comfy.cli_args import LatentPreviewMethod
from mixology.host import demo

CAPTIONS = (
    "a striped red star on a blue background", "a plain yellow circle on a green background",
    "a dotted white cross on a black background", "a checkered purple heart on an orange background",
    "a plain black moon on a white background", "a green background", "a striped orange ring on a purple background",
    "a plain blue square on a yellow background")
NAMES = demo.read_config()["checkpoints"]


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Auto)


def preview(latent_format: Any, latent: torch.Tensor) -> torch.Tensor:
    """The host's own preview of a latent in the model's space: [h, w, 3], 0 to 1."""
    previewer = latent_preview.get_previewer(torch.device("cpu"), latent_format)
    _, picture, _ = previewer.decode_latent_to_preview_image("JPEG", latent)
    return torch.from_numpy(numpy.array(picture)).float() / 255


def shrink(image: torch.Tensor) -> torch.Tensor:
    """[1, H, W, 3] to one pixel for each of the latent's, [h, w, 3]."""
    return F.avg_pool2d(image.movedim(-1, 1), 8)[0].movedim(0, -1)


def encode(model: Any, vae: Any, caption: str, seed: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture's latent in the model's space, and what it decodes to."""
    latent = vae.encode(demo.draw_picture(caption, seed, 128, 128)[0])
    return model.get_model_object("latent_format").process_in(latent), shrink(vae.decode(latent))


@pytest.mark.seam
def test_pictures_are_previewed_in_their_colours(checkpoints: Any) -> None:
    """On pictures that the fit has not seen; with SD1.x's own factors the colours are others."""
    model, _, vae = checkpoints("shapes")
    errors, before = [], []
    for caption in CAPTIONS:
        latent, expected = encode(model, vae, caption)
        errors.append(float((preview(model.model.latent_format, latent) - expected).abs().mean()))
        before.append(float((preview(comfy.latent_formats.SD15(), latent) - expected).abs().mean()))
    assert max(errors) < 0.09 and sum(errors) / len(errors) < 0.06, errors
    assert sum(before) / len(before) > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_has_them(name: str, checkpoints: Any) -> None:
    """All share one autoencoder."""
    model, _, vae = checkpoints(name)
    assert type(model.model.latent_format) is comfy.latent_formats.SD15  # trajectories tell models by it
    latent, expected = encode(model, vae, CAPTIONS[0])
    assert (preview(model.get_model_object("latent_format"), latent) - expected).abs().mean() < 0.09
    assert model.model.latent_format.taesd_decoder_name is None, "SD1.x's small decoder would show other colours"


def test_previews_of_a_run_become_the_picture(checkpoints: Any) -> None:
    """At first a model guesses what is no picture, which a decoder paints as it likes."""
    import nodes as core

    model, clip, vae = checkpoints("shapes")
    positive, negative = (core.CLIPTextEncode().encode(clip, text)[0] for text in (CAPTIONS[0], ""))
    guesses: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_preview, "prepare_callback", lambda *model: lambda step, x0, *rest: guesses.append(x0))
        core.common_ksampler(model, 3, 8, 4.0, "euler", "normal", positive, negative,
                             {"samples": torch.zeros(1, 4, 16, 16)})
    form = model.model.latent_format
    errors = [float((preview(form, guess) - shrink(vae.decode(form.process_out(guess)))).abs().mean())
              for guess in guesses]
    assert len(errors) == 8 and max(errors) < 0.18 and max(errors[4:]) < 0.08, errors
    torch.testing.assert_close(preview(form, guesses[-1].double()), preview(form, guesses[-1]), rtol=0, atol=0.005)
