"""Token attention scale on the demo checkpoint beside LoRA, LoRA hooks, ControlNet, regions and layout mixing."""
from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from company import CAPTION, COMPANY, Parts
from mixology.host.factors import SCALE_KEY
from mixology.host.layout import Mix, make_layout, mix_latent
from mixology.host.marks import read_mark
from mixology.host.run import Schedule
from mixology.host.token_scale import scale_tokens
from torch import Tensor


@pytest.fixture(scope="module")
def loaded(checkpoints: Any) -> Parts:
    return checkpoints("shapes")


def encode(clip: Any, text: str) -> Any:
    return core.CLIPTextEncode().encode(clip, text)[0]


def sample(parts: Parts, batch: int, steps: int = 2) -> Tensor:
    latent = tiny.latent(batch, 16, 14)["samples"]
    noise = comfy.sample.prepare_noise(latent, 5)
    return tiny.cfg_guider(*parts, 3.0).sample(
        noise, latent, comfy.samplers.sampler_object("euler"), tiny.sigmas_of(parts[0], steps=steps),
        disable_pbar=True, seed=5)


def scale_explicitly(model: Any, text: Tensor, tokens: list[int], s: float) -> Any:
    """The model with values scaled by the test itself wherever it reads `text`."""
    clone = model.clone()
    text = text[0]

    def scale(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        value = value.clone()
        for row in range(len(value)):
            if torch.equal(context[row, :len(text)], text):
                for start in range(0, value.shape[1], len(text)):
                    value[row, [start + token for token in tokens]] *= s
        return n, context, value

    clone.set_model_attn2_patch(scale)
    return clone


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_company_acts_on_the_scaled_prompt_as_on_any(loaded: Parts, company: Any, batch: int) -> None:
    """Equal to scaling every row that reads this text by hand (float32 rounding); afterwards nothing is left."""
    model, clip, _ = loaded
    scaled, positive = scale_tokens(model, clip, CAPTION, "red = -1.5", 0.0, 1.0)
    red = CAPTION.split().index("red") + 1
    negative = encode(clip, "")
    before = sample((scaled, positive, negative), batch)
    ours = sample(company((scaled, positive, negative)), batch)
    plain = [[text, {key: value for key, value in options.items() if key != "model_conds"}]
             for text, options in positive]
    by_hand = company((scale_explicitly(model, plain[0][0], [red], -1.5), plain, negative))
    assert torch.allclose(ours, sample(by_hand, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, sample(company((model, plain, negative)), batch), atol=1e-2)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert torch.equal(sample((scaled, positive, negative), batch), before)


def test_all_ones_and_no_lines_are_the_plain_encoder(loaded: Parts) -> None:
    """Bit for bit: the conditioning is CLIPTextEncode's and the picture is the plain one."""
    model, clip, _ = loaded
    negative = encode(clip, "")
    plain = sample((model, encode(clip, CAPTION), negative), 3)
    for scales in ("", "red = 1\nstar = [1, 1, 1.0]"):
        scaled, positive = scale_tokens(model, clip, CAPTION, scales, 0.0, 1.0)
        assert torch.equal(positive[0][0], encode(clip, CAPTION)[0][0])
        assert positive[0][1].keys() == encode(clip, CAPTION)[0][1].keys()
        assert torch.equal(sample((scaled, positive, negative), 3), plain)


@pytest.mark.parametrize("words", [20, 40])
def test_words_of_a_long_prompt(loaded: Parts, words: int) -> None:
    """Over two and three chunks of 77 tokens, every occurrence counts."""
    model, clip, _ = loaded
    text = ", ".join([CAPTION] * (words // 2))
    scaled, positive = scale_tokens(model, clip, text, "red = 0", 0.0, 1.0)
    tokens = positive[0][0].shape[1]
    assert tokens > 77 and tokens % 77 == 0
    factors = read_mark(positive[0][1], SCALE_KEY).factors
    pairs = [pair for chunk in clip.tokenize(text)["l"] for pair in chunk]
    red = clip.tokenize("red")["l"][0][1][0]
    assert factors[0].tolist() == [float(token != red) for token, _ in pairs] and factors.eq(0).sum() == words // 2
    negative = encode(clip, "")
    by_hand = scale_explicitly(model, positive[0][0], factors[0].eq(0).nonzero().flatten().tolist(), 0.0)
    plain = [[positive[0][0], {}]]
    assert torch.allclose(sample((scaled, positive, negative), 1), sample((by_hand, plain, negative), 1), rtol=1e-4,
                          atol=1e-4)


def test_with_layout_mixing(loaded: Parts) -> None:
    """A scaled prompt under the Layout Mix sampler, one s for each image of the batch."""
    model, clip, _ = loaded
    scaled, positive = scale_tokens(model, clip, CAPTION, "red = [-1, 1, 2]", 0.0, 1.0)
    negative = encode(clip, "")
    layout = make_layout(tiny.latent(1, 16, 14), 5, "shared")

    def mix(model: Any, positive: Any, nus: str) -> Tensor:
        return mix_latent(
            model, positive, negative, layout, schedule=Schedule(0, 8, 3.0, "euler", "normal"),
            mix=Mix(0.5, 0.6, 0.3, nus))["samples"]

    ours = mix(scaled, positive, "0.7, 0.7, 0.7")
    for index, s in enumerate((-1, 1, 2)):
        single, prompt = scale_tokens(model, clip, CAPTION, f"red = {s}", 0.0, 1.0)
        assert torch.allclose(ours[index:index + 1], mix(single, prompt, "0.7"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[0], ours[2], atol=1e-2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"scales": "tiger = 2"}, "finds no 'tiger' in the prompt; choose from its words as the tokenizer l sees them: "
                              "a, striped, red, star, on, blue, background"),
    ({"scales": "red"}, "expected lines such as 'tiger = -1.5' .*, got 'red'; write one phrase"),
    ({"scales": "red = 11"}, "expected values from -10 to 10, got 'red = 11'; choose a smaller one"),
    ({"scales": "red = [1, 2]\nstar = [1, 2, 3]"}, r"expected lists of one length, got \[2, 3\]; give every list"),
    ({"start": 0.6, "end": 0.5}, "expected start_percent at or below end_percent, got 0.6 and 0.5; swap them"),
    ({"clip": None}, "expected a text encoder, got none; use a checkpoint that holds one"),
])
def test_mistakes_are_one_sentence(loaded: Parts, changes: dict[str, Any], message: str) -> None:
    model, clip, _ = loaded
    with pytest.raises(ValueError, match=f"^Token Attention Scale {message}") as caught:
        scale_tokens(model, changes.get("clip", clip), CAPTION, changes.get("scales", "red = 2"),
                     changes.get("start", 0.0), changes.get("end", 1.0))
    assert "\n" not in str(caught.value)
