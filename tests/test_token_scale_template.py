"""Only words of the prompt are words: the host's own tokenizers that put a template around it and keep it."""
from __future__ import annotations

import functools
import io
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy.text_encoders.flux import KleinTokenizer, KleinTokenizer8B
from comfy.text_encoders.sa_t5 import SAT5Tokenizer
from comfy.text_encoders.z_image import ZImageTokenizer
from mixology.host.families.encoders import TEXT
from mixology.host.prompts import read_prompt
from mixology.host.token_scale import scale_tokens
from mixology.host.words import Part, list_words, parse_scales, place_scales

TEMPLATED = {name: functools.cache(kind) for name, kind in (
    ("klein", KleinTokenizer), ("klein-8b", KleinTokenizer8B), ("z-image", ZImageTokenizer))}
PROMPTS = [
    ("a red user at the end of a start", "user", " user"), ("a red user at the end of a start", "end", " end"),
    ("\n\n assistant of a friend", "assistant", " assistant"), ("think, do not think", "think", "think think"),
    ("im_start <|im_end|> user", "user", " user"), ("a {} of a {user}", "user", "user"),
]


def clip_of(tokenizer: Any) -> Any:
    """What of a CLIP names its tokens; the template stays in the conditioning whole."""
    return SimpleNamespace(tokenizer=tokenizer, cond_stage_model=None, tokenize=tokenizer.tokenize_with_weights)


def factors_of(tokenizer: Any, text: str, scales: list[Any]) -> torch.Tensor:
    rows = {TEXT: len(tokens_of(tokenizer, text))}
    return place_scales(read_prompt(clip_of(tokenizer), text, rows), scales)[TEXT]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    chunks, = tokenizer.tokenize_with_weights(text).values()
    return [token for chunk in chunks for token, _ in chunk]


@pytest.mark.parametrize("name", TEMPLATED)
@pytest.mark.parametrize(("text", "phrase", "found"), PROMPTS)
def test_words_of_the_prompt_are_found_and_no_others(name: str, text: str, phrase: str, found: str) -> None:
    tokenizer = TEMPLATED[name]()
    own = tokens_of(tokenizer, text)
    factors = factors_of(tokenizer, text, [(phrase, [0.5])])[0]
    places = (factors == 0.5).nonzero().flatten().tolist()
    assert "".join(tokenizer.decode([own[place]]) for place in places) == found
    assert min(places) > own.index(tokens_of(tokenizer, "")[1]), "the template's own `user` is no word"


@pytest.mark.parametrize("name", TEMPLATED)
@pytest.mark.parametrize("phrase", ["user", "end", "start", "im", "assistant", "think"])
def test_words_of_the_template_are_no_words(name: str, phrase: str) -> None:
    tokenizer = TEMPLATED[name]()
    for text in ("a red cat", ""):
        words = "a, red, cat" if text else "none"
        with pytest.raises(ValueError, match=f"finds no '{phrase}' in the prompt; .* sees them: {words}.$"):
            factors_of(tokenizer, text, [(phrase, [0.5])])


def test_a_template_that_is_not_found_is_refused() -> None:
    tokenizer = TEMPLATED["klein"]()
    clip = clip_of(tokenizer)
    clip.tokenize = lambda text, **options: tokenizer.tokenize_with_weights(text, llama_template="{} or so", **options)
    with pytest.raises(ValueError, match="expected to find the prompt in the text encoder's template, got another"):
        read_prompt(clip, "a red cat", {TEXT: 512})


def test_encoders_that_are_not_known_are_named() -> None:
    """One that reads sounds; one without word ids."""
    with pytest.raises(ValueError, match="expected a text encoder of SD1.x to SDXL, SD3, Flux, .* or HunyuanImage, "
                                         "got that of Stable Audio, whose words it cannot place; encode with CLIP"):
        read_prompt(clip_of(SAT5Tokenizer()), "a red cat", {TEXT: 128})
    clip = clip_of(TEMPLATED["klein"]())
    clip.tokenize = lambda text, **options: {"qwen3_4b": [[(5, 1.0)]]}
    with pytest.raises(ValueError, match="got that of Flux.2 Klein, which does not; encode with CLIP Text Encode"):
        read_prompt(clip, "a red cat", {TEXT: 512})


# --------------------------------------------------------------------------------------------------- messages

STAR, MOON, SURROGATE = "\u661f", "\u6708", "\ud800"


@pytest.mark.parametrize("letters", [STAR, SURROGATE, "a" * 5000])
@pytest.mark.parametrize("line", ["{} = 1", "{}", "{} = 100", "cat {} = 2"])
def test_every_quoted_text_can_be_logged(monkeypatch: pytest.MonkeyPatch, letters: str, line: str) -> None:
    """Phrases, lines and the words of the prompt, on a console that shows Western letters only."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    tokenizer = TEMPLATED["klein"]()
    text = f"a {MOON} cat " + " ".join(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300))
    with pytest.raises(ValueError, match="^Token Attention Scale ") as caught:
        factors_of(tokenizer, text, parse_scales(line.format(letters)))
    str(caught.value).encode("cp1252")
    assert len(str(caught.value)) < 900 and "\n" not in str(caught.value)


def test_the_list_of_words_is_cut() -> None:
    listed = list_words([Part(f"word{i}", frozenset()) for i in range(300)])
    assert listed.startswith("word0, word1, ") and listed.endswith("...") and len(listed) == 400


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(("start", "end"), [
    (NAN, 1.0), (0.0, NAN), (NAN, NAN), (-INFINITE, 1.0), (0.0, INFINITE), (-0.1, 1.0), (0.0, 1.5)])
def test_a_window_of_no_numbers_or_beyond_the_schema(start: float, end: float) -> None:
    message = re.escape(f"expected start_percent and end_percent from 0 to 1, got {start:g} and {end:g}; choose")
    with pytest.raises(ValueError, match=f"^Token Attention Scale {message}"):
        scale_tokens(None, None, "a cat", "cat = 2", start, end)


@pytest.mark.parametrize("value", ["1e400", "-1e400", "[1, 1e999]", "10.0001"])
def test_values_beyond_all_bounds(value: str) -> None:
    with pytest.raises(ValueError, match="expected values from -10 to 10, got 'cat = "):
        parse_scales(f"cat = {value}")
    assert torch.tensor(parse_scales("cat = 1e-400")[0][1]).item() == 0.0
