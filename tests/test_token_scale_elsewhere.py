"""A prompt that another node encoded: its words are those of the text, its rows those that the text gets."""
from __future__ import annotations

import re
from typing import Any

import comfy_extras.nodes_qwen as qwen_nodes
import node_helpers
import nodes as core
import pytest
import tiny
import torch
from comfy.text_encoders.longcat_image import LongCatImageTokenizer
from encoders import ENCODERS, MODERN, text_encoder
from mixology.host.factors import SCALE_KEY
from mixology.host.marks import read_mark
from mixology.host.token_scale import scale_tokens

pytestmark = pytest.mark.seam
PROMPT = "make the red platypus sleep, \\(deep\\) in the snow"
OTHER = PROMPT.replace("platypus", "quokka")


@pytest.fixture(scope="module")
def flux() -> Any:
    return text_encoder("flux")


def seeing_encoder(name: str) -> Any:
    """With a stand-in for the vision tower, whose real size is fixed: a picture becomes 6 x 4 tokens of its mean."""
    clip = text_encoder(name)

    def see(embed: dict[str, Any], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randn(24, 32, generator=torch.Generator().manual_seed(3)) * embed["data"].mean()
        return rows.to(device), torch.tensor([[1, 12, 8]])

    def see_deep(embed: dict[str, Any], device: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        rows, grid = see(embed, device)
        return rows, {"grid": grid, "deepstack": [torch.zeros_like(rows)]}

    if name == "krea2":
        clip.cond_stage_model.qwen3vl_4b.transformer.preprocess_embed = see_deep
    else:
        clip.cond_stage_model.qwen25_7b.transformer.preprocess_embed = see
    return clip


@pytest.fixture(scope="module")
def qwen() -> Any:
    return seeing_encoder("qwen")


def encode(clip: Any, text: str) -> list[Any]:
    return core.CLIPTextEncode().encode(clip, text)[0]


def scale(clip: Any, text: str, scales: str, conditioning: Any) -> list[Any]:
    return scale_tokens(tiny.unet(), clip, text, scales, start_percent=0.25, end_percent=1.0,
                        conditioning=conditioning)[1]


def places_of(clip: Any, text: str, phrase: str, conditioning: Any) -> list[int]:
    scaled = scale(clip, text, f"{phrase} = -1", conditioning)
    mark = read_mark(scaled[0][1], SCALE_KEY)
    assert torch.equal(scaled[0][0], conditioning[0][0]) and mark.factors.shape[1] == scaled[0][0].shape[1]
    return (mark.factors[0] == -1.0).nonzero().flatten().tolist()


def changed(before: Any, after: Any) -> list[int]:
    change = (before[0][0] - after[0][0])[0].abs().amax(-1)
    return (change > change.max() / 3).nonzero().flatten().tolist()


def test_all_that_a_conditioning_carries_stays(flux: Any) -> None:
    """As Kontext's has it: the same factors as without the input, and nothing else is new."""
    latent, mask = torch.randn(1, 16, 4, 4), torch.ones(1, 8, 8)
    given = node_helpers.conditioning_set_values(encode(flux, PROMPT), {
        "reference_latents": [latent], "guidance": 2.5, "mask": mask, "area": (4, 4, 0, 0), "strength": 0.5})
    before = dict(given[0][1])
    scaled = scale(flux, PROMPT, "platypus = -1\nsnow = [0, 2]", given)
    assert given[0][1] == before and scaled[0][0] is given[0][0]
    assert scaled[0][1].keys() - before.keys() == {"model_conds"}
    assert all(scaled[0][1][key] is value for key, value in before.items())
    own = read_mark(scale(flux, PROMPT, "platypus = -1\nsnow = [0, 2]", None)[0][1], SCALE_KEY)
    mark = read_mark(scaled[0][1], SCALE_KEY)
    assert torch.equal(mark.factors, own.factors) and mark.start_percent == 0.25
    assert bool((mark.factors == -1.0).any())


def test_ones_hand_the_conditioning_on(flux: Any) -> None:
    given = encode(flux, PROMPT)
    for scales in ("", "platypus = 1"):
        assert scale(flux, PROMPT, scales, given) is given


def test_half_precision_and_weighed_words_are_the_same_text(flux: Any) -> None:
    text, options = encode(flux, PROMPT)[0]
    weights = torch.rand(text.shape[1], 1) + 0.5
    for rows in (text.half(), text.bfloat16(), text * weights):
        assert places_of(flux, PROMPT, "platypus", [[rows, options]])


@pytest.mark.parametrize("other", [OTHER, PROMPT.replace("sleep", "sleeping"), ""])
def test_another_text_is_refused(flux: Any, other: str) -> None:
    with pytest.raises(ValueError, match="expected the conditioning of this text, got another; give the very text and "
                                         "CLIP that it was made with, or connect no conditioning"):
        scale(flux, PROMPT, "snow = 0", encode(flux, other))


def test_what_cannot_be_the_text_is_refused(flux: Any) -> None:
    given = encode(flux, PROMPT)
    longer = core.ConditioningConcat().concat(given, given)[0]
    message = "expected 256 tokens in the conditioning of this text from the text encoder of Flux, got 512; give the v"
    with pytest.raises(ValueError, match=message):
        scale(flux, PROMPT, "snow = 0", longer)
    narrow = [[given[0][0][..., :16], given[0][1]]]
    with pytest.raises(ValueError, match="expected the conditioning of this text, got another"):
        scale(flux, PROMPT, "snow = 0", narrow)
    for many in (given + given, []):
        with pytest.raises(ValueError, match=f"expected a conditioning of one text, got {len(many)}; connect it befor"):
            scale(flux, PROMPT, "snow = 0", many)
    with pytest.raises(ValueError, match="expected a conditioning that holds a text, got one without; connect that"):
        scale(flux, PROMPT, "snow = 0", [[None, {}]])
    with pytest.raises(ValueError, match="expected a conditioning without scales, got one that has some; write all"):
        scale(flux, PROMPT, "snow = 0", scale(flux, PROMPT, "snow = 0", given))
    with pytest.raises(ValueError, match="finds no 'bird' in the prompt; choose from its words"):
        scale(flux, PROMPT, "bird = 0", given)


def test_other_texts_of_a_conditioning_are_held_against_it_too() -> None:
    hidream, anima = text_encoder("hidream"), text_encoder("anima")
    for clip, option in ((hidream, "conditioning_llama3"), (anima, "t5xxl_ids")):
        given, other = encode(clip, PROMPT), encode(clip, OTHER)
        assert read_mark(scale(clip, PROMPT, "platypus = 0", given)[0][1], SCALE_KEY) is not None
        mixed = [[given[0][0], {**given[0][1], option: other[0][1][option]}]]
        with pytest.raises(ValueError, match="expected the conditioning of this text, got another"):
            scale(clip, PROMPT, "platypus = 0", mixed)
    mark = read_mark(scale(hidream, PROMPT, "platypus = 0", None)[0][1], SCALE_KEY)
    assert list(mark.others) == ["conditioning_llama3"] and mark.others["conditioning_llama3"].eq(0).any()


# --------------------------------------------------------------------------------------------------- pictures

def edit(clip: Any, text: str, pictures: int) -> list[Any]:
    """As the host's nodes for Qwen-Image-Edit encode it: with one picture, or with several numbered ones."""
    images = [torch.full((1, 32, 48, 3), 0.2 + 0.3 * index) for index in range(pictures)]
    if pictures == 1:
        return qwen_nodes.TextEncodeQwenImageEdit.execute(clip, text, image=images[0]).args[0]
    named = {f"image{index + 1}": image for index, image in enumerate(images)}
    return qwen_nodes.TextEncodeQwenImageEditPlus.execute(clip, text, **named).args[0]


@pytest.mark.parametrize("pictures", [1, 2, 3])
@pytest.mark.parametrize("text", [PROMPT, "\n  platypus", "platypus <|im_end|> user, the end"])
def test_words_behind_pictures(qwen: Any, pictures: int, text: str) -> None:
    before, after = (edit(qwen, changing, pictures) for changing in (text, text.replace("platypus", "quokka")))
    assert before[0][0].shape[1] > 24 * pictures
    places = places_of(qwen, text, "platypus", before)
    assert places == changed(before, after) and len(places) == 3
    for word in ("picture", "assistant", "describe"):
        with pytest.raises(ValueError, match=f"finds no '{word}' in the prompt"):
            places_of(qwen, text, word, before)


def test_edit_prompts_without_pictures_are_held_against_the_text(qwen: Any) -> None:
    given = edit(qwen, PROMPT, 1)
    own = encode(qwen, PROMPT)
    assert places_of(qwen, PROMPT, "platypus", own) == changed(own, encode(qwen, OTHER))
    with pytest.raises(ValueError, match="expected the conditioning of this text, got another"):
        scale(qwen, PROMPT, "platypus = 0", encode(qwen, OTHER))
    short = [[given[0][0][:, -8:], given[0][1]]]
    message = f"expected {own[0][0].shape[1]} tokens in the conditioning of this text from the text encoder of Qwen-"
    with pytest.raises(ValueError, match=re.escape(message)):
        scale(qwen, PROMPT, "platypus = 0", short)


@pytest.mark.skipif(not hasattr(LongCatImageTokenizer, "EDIT_PREFIX"), reason="this host's LongCat sees no pictures")
def test_words_behind_pictures_of_longcat() -> None:
    clip = seeing_encoder("longcat")
    before, after = edit(clip, PROMPT, 1), edit(clip, OTHER, 1)
    assert before[0][0].shape[1] > 512 + 24
    assert places_of(clip, PROMPT, "platypus", before) == changed(before, after)


SEEING = [name for name in ("qwen", "hunyuan_video_15", "krea2") if name in {**ENCODERS, **MODERN}]
LONGER = "a blue whale and a big dog in the snow at night under seven stars"


@pytest.mark.parametrize("name", SEEING)
def test_a_longer_text_is_no_picture(name: str) -> None:
    """Whatever length it has, and also where it begins as the text does; a picture's opening alone is proof."""
    clip = seeing_encoder(name)
    text = "a red cat"
    for longer in (LONGER, "a red cat in", "a red cat in the", "a red cat, a red cat", f"Picture 1: {LONGER}"):
        with pytest.raises(ValueError, match="expected the conditioning of this text, .*got another; give the very "
                                             "text and CLIP that it was made with, or connect no conditioning"):
            scale(clip, text, "cat = -1", encode(clip, longer))
    before, after = edit(clip, PROMPT, 2), edit(clip, OTHER, 2)
    assert places_of(clip, PROMPT, "platypus", before) == changed(before, after)
    moved = [[before[0][0].roll(1, dims=1), before[0][1]]]
    with pytest.raises(ValueError, match="alone or behind pictures as the host's TextEncodeQwenImageEdit writes them"):
        scale(clip, PROMPT, "platypus = -1", moved)


def test_a_longer_text_of_an_encoder_that_sees_none() -> None:
    clip = text_encoder("hunyuan_image")
    for longer in ("a red cat in", "a red cat in the snow", LONGER):
        with pytest.raises(ValueError, match="give the very text and CLIP that it was made with, or connect no cond"):
            scale(clip, "a red cat", "cat = -1", encode(clip, longer))
