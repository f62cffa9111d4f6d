"""Words of a prompt and their tokens: with the host's tokenizers, and against what its text encoders make of them."""
from __future__ import annotations

import re
from typing import Any

import nodes as core
import pytest
import tiny
import torch
from comfy.text_encoders.hydit import HyditBertTokenizer
from encoders import ENCODERS, save_embeddings, text_encoder
from mixology.host.factors import SCALE_KEY
from mixology.host.families.encoders import TEXT
from mixology.host.marks import read_mark
from mixology.host.prompts import read_prompt
from mixology.host.spelling import spell_tokens
from mixology.host.token_scale import scale_tokens
from mixology.host.words import parse_scales, place_scales
from torch import Tensor

PROMPT = "a photo of a red platypus in the snow"
OTHER = PROMPT.replace("platypus", "quokka")  # as many tokens for every tokenizer, all different
FILLER = "one two three four five six seven eight nine ten"  # a token each for CLIP


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, text_encoder(request.param)


@pytest.fixture(scope="module")
def sd1() -> Any:
    return text_encoder("sd1")


@pytest.fixture(scope="module")
def flux() -> Any:
    return text_encoder("flux")


@pytest.fixture(scope="module")
def qwen() -> Any:
    return text_encoder("qwen")


def encode(clip: Any, text: str) -> Tensor:
    """[tokens, channels]"""
    return core.CLIPTextEncode().encode(clip, text)[0][0][0][0]


def factors_of(clip: Any, text: str, scales: list[Any], tokens: int) -> Tensor:
    """[values, tokens] for a conditioning of so many."""
    return place_scales(read_prompt(clip, text, {TEXT: tokens}), scales)[TEXT]


def places_of(clip: Any, text: str, phrase: str) -> list[int]:
    """Positions that a phrase has in a conditioning."""
    tokens = len(encode(clip, text))
    factors = factors_of(clip, text, [(phrase, [0.5])], tokens)
    assert factors.shape == (1, tokens) and bool(((factors == 1.0) | (factors == 0.5)).all())
    return (factors[0] == 0.5).nonzero().flatten().tolist()


def changed(before: Tensor, after: Tensor, minimum: float = 1 / 3) -> list[int]:
    """Positions that changed by more than a part of the largest change."""
    change = (before - after).abs().amax(-1)
    return (change > minimum * change.max()).nonzero().flatten().tolist()


def clip_tokens(name: str) -> int:
    """Of a one-chunk SD3 conditioning before T5's; the whole one of other families."""
    return {"sd3": 77, "sd3_l_t5": 77}.get(name, 0)


# --------------------------------------------------------------------------------------------------- lines

@pytest.mark.parametrize(("line", "scale"), [
    ("tiger = -1.5", ("tiger", [-1.5])), ("  polar bear=2\t", ("polar bear", [2.0])), ("x=.5", ("x", [0.5])),
    ("x = +3.", ("x", [3.0])), ("x = -1e-1", ("x", [-0.1])), ("x = 10", ("x", [10.0])), ("x = -10", ("x", [-10.0])),
    ("a = b = 0", ("a = b", [0.0])), ("x = [-1, 0,1.5]", ("x", [-1.0, 0.0, 1.5])), ("x = [ 2 ]", ("x", [2.0])),
    ("x = [1, 2,]", ("x", [1.0, 2.0])), ("(x:1.2) = 1", ("(x:1.2)", [1.0])),
    ("embedding:x = 0", ("embedding:x", [0.0])), ("\u8001\u864e = 2", ("\u8001\u864e", [2.0]))])
def test_lines_that_can_be_read(line: str, scale: Any) -> None:
    assert parse_scales(line) == [scale]


def test_empty_lines_are_passed_over_and_order_is_kept() -> None:
    assert parse_scales("") == parse_scales(" \n\r\n\t") == []
    assert parse_scales("\r\nb = 1\r\n\n  \na = [1, 2]\nb = 3\n") == [("b", [1.0]), ("a", [1.0, 2.0]), ("b", [3.0])]


@pytest.mark.parametrize("line", [
    "tiger", "= 2", " = ", "tiger =", "tiger = red", "tiger = 1 2", "tiger = 1, 2", "tiger = [1, 2", "tiger = 1]",
    "tiger = []", "tiger = [,]", "tiger = [1,,2]", "tiger = [1 2]", "tiger: 2", "tiger = nan", "tiger = inf",
    "tiger = 0x1", "tiger = 1_0", "tiger = --1"])
def test_lines_that_cannot_be_read(line: str) -> None:
    message = (f"expected lines such as 'tiger = -1.5' or 'tiger = [-1, 0, 1]', got '{line.strip()}'; write one "
               "phrase, '=' and its value.")
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_scales(f"bear = 1\n{line}")


@pytest.mark.parametrize("values", ["10.1", "-11", "1e3", "[0, -10.5]"])
def test_values_beyond_the_limit(values: str) -> None:
    message = f"expected values from -10 to 10, got 'tiger = {values}'; choose a smaller one."
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_scales(f"tiger = {values}")


def test_lists_of_unequal_length() -> None:
    assert len(parse_scales("a = [1, 2]\nb = 3\nc = [4]\nd = [5, 6]")) == 4
    with pytest.raises(ValueError, match=re.escape("expected lists of one length, got [2, 3]; give every list one "
                                                   "value for each image of the batch.")):
        parse_scales("a = [1, 2]\nb = 3\nc = [1, 2, 3]")


# --------------------------------------------------------------------------------------------------- phrases

def decoded(clip: Any, text: str, phrase: str) -> dict[str, str]:
    """What each of the host's tokenizers decodes the tokens of a phrase to, without spaces and case."""
    found, encoded, tokens = {}, clip.tokenize(text), len(encode(clip, text))
    for name in (reading.encoder for reading in read_prompt(clip, text, {TEXT: tokens})):
        tokenizer = getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}")
        own = [token for chunk in encoded[name] for token, _ in chunk][-tokens:]  # Qwen's lose the template's front
        letters = tokenizer.decode([own[place] for place in places_of(clip, text, phrase)])
        found[name] = "".join(letters.split()).lower()
    return found


PHRASES = [
    ("a photo of a tiger in the snow", "tiger", "tiger"),
    ("a photo of a polar bear, a polar fox and a bear", "polar bear", "polarbear"),
    ("a tiger, a Tiger and a TIGER!", "tiger", "tigertigertiger"), ("a tiger in the snow", "TIGER", "tiger"),
    ("a cat in a catalogue of cats, concatenated", "cat", "cat"),
    ("the red car is not redder than the reds", "red", "red"),
    ("a platypus, a capybara and an axolotl", "capybara", "capybara"),
    ("a tiger-striped cat", "tiger", "tiger"), ("a tiger-striped cat", "tiger-striped", "tiger-striped"),
    ("the tiger's tail", "tiger", "tiger"), ("the tiger's tail", "tiger's tail", "tiger'stail"),
    ("snow! snow? (snow)", "snow", "snowsnowsnow"), ("no tiger... tiger, tiger", "tiger, tiger", "tiger,tiger"),
    ("512 tigers, 51 bears, 2 cats", "2", "2"), ("512 tigers, 51 bears, 2 cats", "51", "51"),
    ("512 tigers, 51 bears, 2 cats", "512 tigers", "512tigers"), ("version 3.5 of it", "3.5", "3.5"),
    ("a caf\u00e9 in Z\u00fcrich", "caf\u00e9", "caf\u00e9"), ("a caf\u00e9 in Z\u00fcrich", "cafe\u0301", "caf\u00e9"),
    ("a cafe\u0301 in Z\u00fcrich", "caf\u00e9", "caf\u00e9"), ("in Z\u00fcrich", "Z\u00dcRICH", "z\u00fcrich"),
    ("a (tiger:1.3) in (deep:0.5) snow", "tiger", "tiger"), ("a \\(tiger\\) in snow", "tiger", "tiger"),
    ("one cat BREAK two cats\nthree\tcats", "two cats three", "twocatsthree"),
]
EMPHASIS = [  # signs that these tokenizers do not see, or not as part of the word
    ("a (polar bear:1.3) cub", "polar bear cub", "polarbearcub"),
    ("((tiger)) and (a (red:0.5) cat:1.2) here", "red cat here", "redcathere"),
    ("((tiger)) and (a (red:0.5) cat:1.2)", "tiger and a red", "tigerandared"),
    ("a tiger in the (\\(deep\\):1.2) snow", "deep", "deep"), ("a (\\(tiger:1.2) cub", "tiger cub", "tigercub"),
    ("red,tiger.snow", "tiger", "tiger"), ("a blue_sky", "sky", "sky"),
]
OWN = [  # one tokenizer each
    ("sd1", "\u4e00\u53ea\u8001\u864e\u5728\u96ea\u5730\u91cc", "\u8001\u864e", "\u8001\u864e"),
    ("qwen", "\u4e00\u53ea\u8001\u864e\u5728\u96ea\u5730\u91cc", "\u8001\u864e", "\u8001\u864e"),
    ("sd1", "a \U0001f42f tiger\u2122", "\U0001f42f", "\U0001f42f"),
    ("sd1", "1girl, blue_sky", "girl", "girl"), ("flux", "1girl, blue_sky", "girl", "girl"),
    ("qwen", "red,tiger.snow", "tiger", ",tiger"),  # one token for both
    ("qwen", "a (polar bear:1.3) cub", "polar bear", "polarbear"),  # no emphasis here
    ("qwen", "a user's assistant", "assistant", "assistant"), ("qwen", "describe the system", "describe", "describe"),
    ("flux", "a jalape\u00f1o and a jalape", "jalape\u00f1o", "jalapeo"),  # T5 does not know the letter
    ("flux", "a na\u00efve tiger\U0001f42f", "tiger", "tiger"),
]


@pytest.mark.parametrize(("name", "text", "phrase", "expected"), [
    *((name, *case) for name in ("sd1", "flux", "qwen") for case in PHRASES),
    *((name, *case) for name in ("sd1", "flux") for case in EMPHASIS), *OWN])
def test_tokens_of_a_phrase_decode_to_it(request: pytest.FixtureRequest, name: str, text: str, phrase: str,
                                         expected: str) -> None:
    found = decoded(request.getfixturevalue(name), text, phrase)
    assert len(found) == 1 and set(found.values()) == {expected}


def test_phrases_multiply_where_they_meet(sd1: Any) -> None:
    text = "a polar bear and a bear"
    factors = factors_of(sd1, text, [("polar bear", [2.0]), ("bear", [-0.5, 3.0]), ("and", [0.0])], 77)
    assert factors[:, :8].tolist() == [[1, 1, 2, -1, 0, 1, -0.5, 1], [1, 1, 2, 6, 0, 1, 3, 1]]
    assert bool((factors[:, 8:] == 1.0).all())
    assert torch.equal(factors_of(sd1, text, [], 77), torch.ones(1, 77))


# --------------------------------------------------------------------------------------------------- encoded text

def test_positions_are_where_the_encoded_text_changes(encoder: tuple[str, Any]) -> None:
    """Every part of the conditioning: CLIP's and T5's, after Qwen's template; a word of several tokens."""
    name, clip = encoder
    before, after = encode(clip, PROMPT), encode(clip, OTHER)
    places, cut = places_of(clip, PROMPT, "platypus"), clip_tokens(name)
    expected = changed(before[cut:], after[cut:])
    if cut:
        expected = [*changed(before[:cut], after[:cut]), *(cut + place for place in expected)]
    assert places == expected == places_of(clip, OTHER, "quokka") and len(places) == (6 if cut else 3)
    if "t5" not in name and name not in ("sd3", "flux"):  # causal: nothing changes before the word
        assert changed(before, after, 0.0)[:3] == places


def test_emphasis_and_other_words_move_with_their_tokens(encoder: tuple[str, Any]) -> None:
    name, clip = encoder
    text = "((a)) (snowy:1.2) day, a (red {}:0.7) \\(asleep\\) in the grass"
    before, after = encode(clip, text.format("platypus")), encode(clip, text.format("quokka"))
    cut = clip_tokens(name)
    late = [cut + place for place in changed(before[cut:], after[cut:])]
    assert places_of(clip, text.format("platypus"), "platypus")[-3:] == late


@pytest.mark.parametrize("words", [80, 150, 160])
def test_words_in_later_chunks(sd1: Any, words: int) -> None:
    """75 words of a token each fill a chunk."""
    head = " ".join((FILLER.split() * 20)[:words])
    text = f"{head} red {{}} at night"
    before, after = (encode(sd1, text.format(word)) for word in ("platypus", "quokka"))
    place = words + 1
    assert len(before) == (231 if words >= 150 else 154)
    expected = [77 * (index // 75) + 1 + index % 75 for index in range(place, place + 3)]
    assert places_of(sd1, text.format("platypus"), "platypus") == changed(before, after) == expected


@pytest.mark.parametrize(("words", "phrase", "expected"), [
    (73, "red platypus", [74, 75, 78, 79]),  # the word itself lies in two chunks
    (74, "red platypus", [75, 78, 79, 80]), (72, "red platypus", [73, 74, 75, 78]),
    (148, "red platypus", [151, 152, 155, 156])])
def test_phrases_over_the_end_of_a_chunk(sd1: Any, words: int, phrase: str, expected: list[int]) -> None:
    head = " ".join((FILLER.split() * 20)[:words])
    before, after = (encode(sd1, f"{head} {pair} at night") for pair in ("red platypus", "blue quokka"))
    assert places_of(sd1, f"{head} red platypus at night", phrase) == changed(before, after) == expected


def test_long_prompts(encoder: tuple[str, Any]) -> None:
    """Two chunks of CLIP's, one of T5's or Qwen's."""
    name, clip = encoder
    text, cut = f"{' '.join([FILLER] * 8)} red {{}} at night", 2 * clip_tokens(name)
    before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
    late = [cut + place for place in changed(before[cut:], after[cut:])]
    early = changed(before[:cut], after[:cut]) if cut else [] if name in ("sd3_t5", "flux", "qwen") else late
    assert places_of(clip, text.format("platypus"), "platypus") == sorted({*early, *late})
    assert len(late) == 3 and early in ([], [84, 85, 86])


# --------------------------------------------------------------------------------------------------- embeddings

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("embeddings")
    save_embeddings(place)
    return str(place)


@pytest.fixture(scope="module")
def inverted(folder: str) -> dict[str, Any]:
    return {name: text_encoder(name, folder) for name in ("sd1", "sdxl")}


def test_embeddings_are_found_whole(inverted: dict[str, Any]) -> None:
    clip = inverted["sd1"]
    text = "a embedding:three, red {} by (embedding:three.safetensors:1.2)"
    before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
    assert places_of(clip, text.format("platypus"), "platypus") == changed(before, after) == [7, 8, 9]
    assert places_of(clip, text.format("platypus"), "embedding:three") == [2, 3, 4]
    assert places_of(clip, text.format("platypus"), "embedding:Three.Safetensors") == [11, 12, 13]
    plain = encode(clip, "a one two three, red platypus by embedding:three.safetensors")
    assert changed(plain, encode(clip, "a embedding:three, red platypus by embedding:three.safetensors")) == [2, 3, 4]


def test_embedding_over_the_end_of_a_chunk(inverted: dict[str, Any]) -> None:
    """Of 8 vectors and more the host splits it; a shorter one goes to the next chunk as a whole."""
    clip, head = inverted["sd1"], " ".join((FILLER.split() * 8)[:72])
    assert places_of(clip, f"{head} embedding:twelve red platypus", "embedding:twelve") == [
        73, 74, 75, *range(78, 87)]
    long, short = f"{head} embedding:twelve red {{}}", f"{head} a embedding:three red {{}}"
    for text, expected in ((long, [88, 89, 90]), (short, [82, 83, 84])):
        before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
        assert places_of(clip, text.format("platypus"), "platypus") == changed(before, after) == expected
    assert places_of(clip, short.format("cat"), "embedding:three") == [78, 79, 80]


@pytest.mark.parametrize("phrase", ["platypus", "embedding:three"])
def test_embedding_of_another_width_is_dropped(inverted: dict[str, Any], phrase: str) -> None:
    """The host drops it in the encoder, and what follows moves up; one that does not exist it drops at once."""
    clip = inverted["sd1"]
    text = "a embedding:wide red {} by embedding:nothing embedding:three"
    before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
    assert changed(before, after) == [3, 4, 5]
    expected = {"platypus": [3, 4, 5], "embedding:three": [7, 8, 9]}[phrase]
    assert places_of(clip, text.format("platypus"), phrase) == expected
    for name in ("wide", "nothing"):
        with pytest.raises(ValueError, match=f"finds no 'embedding:{name}' in the prompt; choose from its words as "
                                             "the tokenizer l sees them: a, red, cat, by, embedding:three.$"):
            places_of(clip, text.format("cat"), f"embedding:{name}")


def test_encoders_side_by_side_with_embeddings_of_unequal_length(inverted: dict[str, Any]) -> None:
    """A word then has other positions in CLIP-L than in CLIP-G, and is scaled at both."""
    clip = inverted["sdxl"]
    for text, left, right in (("a embedding:both-xl red {} here", [5, 6, 7], [7, 8, 9]),
                              ("a embedding:three red {} here", [6, 7, 8], [3, 4, 5])):  # of SD1: dropped by CLIP-G
        before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
        assert changed(before[:, :768], after[:, :768]) == left
        assert changed(before[:, 768:], after[:, 768:]) == right
        assert places_of(clip, text.format("platypus"), "platypus") == sorted({*left, *right})
    assert places_of(clip, "a embedding:both-xl red cat", "embedding:both-xl") == [2, 3, 4, 5]


def test_words_that_one_encoder_pushes_out_are_scaled_in_the_other(inverted: dict[str, Any]) -> None:
    """The host cuts both to the shorter: two chunks of CLIP-G, of which CLIP-L fills one."""
    clip, head = inverted["sdxl"], " ".join((FILLER.split() * 8)[:70])
    text = f"{head} embedding:both-xl {{}}"
    before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
    assert len(before) == 77 and torch.equal(before[:, 768:], after[:, 768:])
    assert places_of(clip, text.format("platypus"), "platypus") == changed(before, after) == [73, 74, 75]


def test_embeddings_of_t5(folder: str) -> None:
    clip = text_encoder("flux", folder)
    text = "a embedding:t5 red {} embedding:three here"  # of SD1: CLIP-L's, which gives the pooled vector only
    before, after = (encode(clip, text.format(word)) for word in ("platypus", "quokka"))
    expected = changed(before, after)
    assert places_of(clip, text.format("platypus"), "platypus") == expected and len(expected) == 3
    assert len(places_of(clip, text.format("platypus"), "embedding:t5")) == 2
    assert places_of(clip, text.format("platypus"), "here") == [expected[-1] + 1]


# --------------------------------------------------------------------------------------------------- the whole

def test_conditioning_is_that_of_the_core_node(encoder: tuple[str, Any]) -> None:
    _, clip = encoder
    model, text = tiny.unet(), "a (red:1.2) platypus, \\(asleep\\)"
    expected = core.CLIPTextEncode().encode(clip, text)[0]
    _, plain = scale_tokens(model, clip, text, "platypus = 1\nred = [1, 1]", 0.0, 1.0)
    _, marked = scale_tokens(model, clip, text, "platypus = -1\nred = [1, 2]", 0.25, 0.75)
    for conditioning, keys in ((plain, set()), (marked, {"model_conds"})):
        assert len(conditioning) == len(expected) == 1
        assert torch.equal(conditioning[0][0], expected[0][0])
        assert conditioning[0][1].keys() - expected[0][1].keys() == keys
        for key, value in expected[0][1].items():
            own = conditioning[0][1][key]
            assert torch.equal(own, value) if torch.is_tensor(value) else own == value
    mark = read_mark(marked[0][1], SCALE_KEY)
    assert (mark.start_percent, mark.end_percent) == (0.25, 0.75)
    assert mark.factors.shape == (2, expected[0][0].shape[1])
    assert (mark.factors == -1.0).any(0).nonzero().flatten().tolist() == places_of(clip, text, "platypus")
    assert (mark.factors == 2.0).any(0).nonzero().flatten().tolist() == places_of(clip, text, "red")
    assert bool((mark.factors[0] != 2.0).all())


def test_clip_skip_is_honoured(sd1: Any) -> None:
    clip = core.CLIPSetLastLayer().set_last_layer(sd1, -2)[0]
    _, marked = scale_tokens(tiny.unet(), clip, PROMPT, "platypus = 0", 0.0, 1.0)
    assert torch.equal(marked[0][0], core.CLIPTextEncode().encode(clip, PROMPT)[0][0][0])
    assert not torch.equal(marked[0][0][0], encode(sd1, PROMPT))


def test_missing_phrase_lists_the_words(encoder: tuple[str, Any]) -> None:
    name, clip = encoder
    first = {"sd2": "h", "sd3_g": "g", "sd3_t5": "t5xxl", "flux": "t5xxl", "qwen": "qwen25_7b"}.get(name, "l")
    for phrase in ("tiger", "polar bear cub", "bear polar", "bea", "51"):
        message = (f"Token Attention Scale finds no '{phrase}' in the prompt; choose from its words as the tokenizer "
                   f"{first} sees them: a, red, polar, bear, 5, 1, 2, it, s.")
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            scale_tokens(tiny.unet(), clip, "A red polar bear, a 512: it's!", f"red = 2\n{phrase} = 0", 0.0, 1.0)


def test_empty_prompt_has_no_words(sd1: Any, qwen: Any) -> None:
    for clip in (sd1, qwen):
        with pytest.raises(ValueError, match="finds no 'tiger' .* sees them: none.$"):
            scale_tokens(tiny.unet(), clip, "", "tiger = 0", 0.0, 1.0)
        assert read_mark(scale_tokens(tiny.unet(), clip, "", "", 0.0, 1.0)[1][0][1], SCALE_KEY) is None


def test_letters_that_t5_does_not_know(flux: Any) -> None:
    with pytest.raises(ValueError, match="finds no 'jalapeno' .* tokenizer t5xxl sees them: a, jalape\ufffdo.$"):
        places_of(flux, "a jalape\u00f1o", "jalapeno")
    with pytest.raises(ValueError, match="sees them: none.$"):
        places_of(flux, "\u8001\u864e", "\u8001\u864e")


def test_unknown_text_encoder_is_a_clear_error(sd1: Any) -> None:
    for tokens in (80, 154):  # a conditioning that these tokens do not explain; NegPip's has twice as many
        with pytest.raises(ValueError, match=f"expected 77 tokens for this prompt from the text encoder of SD1.x, got "
                                             f"{tokens}; connect it as it was loaded, before a node that changes it"):
            factors_of(sd1, PROMPT, [("red", [0.5])], tokens)
    tokenizer = HyditBertTokenizer()
    token = tokenizer.tokenize_with_weights("tiger", return_word_ids=True)[0][1]
    with pytest.raises(ValueError, match="expected a CLIP, T5, Gemma, Llama, Mistral or Qwen tokenizer, got "
                                         "HyditBertTokenizer; use the text encoder that belongs to the model"):
        spell_tokens(tokenizer, [(token[0], 1)])


def test_no_text_encoder_and_a_reversed_window_are_clear_errors(sd1: Any) -> None:
    with pytest.raises(ValueError, match="expected a text encoder, got none; use a checkpoint that holds one"):
        scale_tokens(tiny.unet(), None, PROMPT, "red = 0", 0.0, 1.0)
    with pytest.raises(ValueError, match="expected start_percent at or below end_percent, got 0.6 and 0.5; swap them"):
        scale_tokens(tiny.unet(), sd1, PROMPT, "red = 0", 0.6, 0.5)
