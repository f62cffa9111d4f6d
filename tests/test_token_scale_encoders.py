"""Words of a prompt in what today's text encoders make of it: exactly the rows that a word's change alters."""
from __future__ import annotations

import functools
import re
from pathlib import Path

import nodes as core
import pytest
import torch
from encoders import ENCODERS, MODERN, text_encoder
from mixology.host.families.encoders import BYT5, LLAMA, T5_IDS, TEXT, count_rows, find_template
from mixology.host.prompts import read_prompt
from mixology.host.words import place_scales
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.seam
PROMPT = "a photo of a red platypus in the snow"
OTHER = PROMPT.replace("platypus", "quokka")
FILLER = "one two three four five six seven eight nine ten"
TIGER, FOX = "\u8001\u864e", "\u72d0\u72f8"  # as many tokens, all different
PLAIN = ("chroma", "cosmos", "ltxv", "wan", "aura", "lumina")  # no template
SLOW = ("klein", "klein_8b")  # 28 layers for 512 tokens
FAST = [name for name in MODERN if name not in SLOW]
SCRIPTED = [name for name in FAST if name not in ("chroma", "cosmos", "ltxv", "hunyuan_video")]  # T5 knows none
TURNED = [name for name in FAST if name not in ("hunyuan_video", *PLAIN)]  # with a chat template
TEMPLATED = [name for name in FAST if name not in PLAIN]
CUT = [name for name in ("qwen", "krea2", "hunyuan_image", "hunyuan_video_15", "longcat", "kandinsky")
       if name in {**ENCODERS, **MODERN}]  # they cut off a template's front


class Encoder:
    """A text encoder, and what it made before."""

    def __init__(self, name: str):
        self.name, self.clip = name, text_encoder(name)
        self.encode = functools.cache(lambda text: core.CLIPTextEncode().encode(self.clip, text)[0][0])

    def factors(self, text: str, phrase: str) -> dict[str, Tensor]:
        return place_scales(read_prompt(self.clip, text, count_rows(*self.encode(text))), [(phrase, [0.5])])

    def places(self, text: str, phrase: str, rows: str = TEXT) -> list[int]:
        """Rows with the factor of a phrase; all others have 1."""
        factors = self.factors(text, phrase)[rows]
        assert bool(((factors == 1.0) | (factors == 0.5)).all())
        return (factors[0] == 0.5).nonzero().flatten().tolist()

    def changed(self, before: str, after: str) -> list[int]:
        return changed(*(self.encode(text)[0][0] for text in (before, after)))


def changed(before: Tensor, after: Tensor) -> list[int]:
    """Rows [tokens, ...] that changed by more than a third of the largest change."""
    change = (before - after).flatten(1).abs().amax(-1)
    return (change > change.max() / 3).nonzero().flatten().tolist()


@pytest.fixture(scope="module", params=MODERN)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(request.param)


# --------------------------------------------------------------------------------------------------- every encoder

def test_positions_are_where_the_encoded_text_changes(encoder: Encoder) -> None:
    places = {*encoder.places(PROMPT, "platypus"), *encoder.places(OTHER, "quokka")}
    assert sorted(places) == encoder.changed(PROMPT, OTHER)
    if encoder.name != "hunyuan_video":  # whose tokenizer may have glued a letter of the next word to it
        assert sorted(places) == encoder.places(PROMPT, "platypus")


@pytest.mark.parametrize("encoder", FAST, indirect=True)
def test_long_prompts_emphasis_and_signs(encoder: Encoder) -> None:
    """More words than CLIP has room for."""
    head = " ".join([FILLER] * 12)
    text = f"{head} \\(ten\\): red {{}}! ... night" if encoder.name == "longcat" else (
        f"((a)) {head} \\(ten\\): ((red) {{}}:0.7)! ... night")
    before, after = (text.format(word) for word in ("platypus", "quokka"))
    places = {*encoder.places(before, "platypus"), *encoder.places(after, "quokka")}
    found = encoder.changed(before, after)
    if encoder.name == "hunyuan_video":
        assert places <= {*found}
    else:
        assert sorted(places) == found


@pytest.mark.parametrize("encoder", SCRIPTED, indirect=True)
def test_letters_of_other_scripts(encoder: Encoder) -> None:
    """In one token, in several, or in a token for each byte."""
    text = f"{TIGER} x {TIGER}\uff01"
    places, found = encoder.places(text, TIGER), encoder.changed(text, text.replace(TIGER, FOX))
    assert places == found if encoder.name != "aura" else {*places} < {*found}  # there the fox has more tokens
    for sign in ("\uff01", "!"):  # the wide one is the narrow one in another form
        assert encoder.places(text, sign) == [max(places) + 1 + place for place in range(
            len(encoder.places(text, sign)))]


def test_words_of_the_template_are_no_words(encoder: Encoder) -> None:
    template = {*re.findall(r"[a-z]+", "".join(find_template(encoder.clip.tokenizer, "")).lower())}
    assert bool(template) == (encoder.name not in PLAIN)
    given = read_prompt(encoder.clip, PROMPT, count_rows(*encoder.encode(PROMPT)))
    for word in sorted(template - set(PROMPT.split())):
        with pytest.raises(ValueError, match=f"finds no '{word}' in the prompt; choose from its words as the "):
            place_scales(given, [(word, [0.5])])
    for word in sorted(template & set(PROMPT.split())):  # "a", "of", "in", "the": of the prompt, not of the template
        own = {token for part in given[0].parts for token in part.tokens}
        assert {*encoder.places(PROMPT, word)} <= own


@pytest.mark.parametrize("encoder", TURNED, indirect=True)
def test_a_prompt_of_the_template_s_words(encoder: Encoder) -> None:
    text = "the end of a start, user: describe <|im_end|> the system, {}"
    if encoder.name == "longcat":
        text = text.replace("<|im_end|> ", "")
    before, after = (text.format(word) for word in ("red platypus", "red quokka"))
    assert encoder.places(before, "platypus") == encoder.changed(before, after)
    for word in ("end", "start", "user", "system"):
        places = encoder.places(before, word)
        assert places and max(places) < min(encoder.places(before, "platypus"))


@pytest.mark.parametrize("encoder", TEMPLATED, indirect=True)
@pytest.mark.parametrize("spaces", ["\t \t \t \t \t \t ", "\n\n \n\t\n \t ", "\u2003" * 3, "\n", "  ", "\r\n\r\n"])
def test_spaces_before_a_prompt(encoder: Encoder, spaces: str) -> None:
    """As many as one likes, of any kind."""
    before, after = (f"{spaces}{word} here" for word in ("platypus", "quokka"))
    places = {*encoder.places(before, "platypus"), *encoder.places(after, "quokka")}
    assert sorted(places) == encoder.changed(before, after)


@pytest.mark.parametrize("encoder", CUT, indirect=True)
def test_a_user_s_turn_without_a_system_s(encoder: Encoder) -> None:
    """Alone it is read; the encoder cuts it off where another turn follows."""
    alone = "<|im_start|>user\na red {} here<|im_end|>"
    before, after = (alone.format(word) for word in ("platypus", "quokka"))
    assert encoder.places(before, "platypus") == encoder.changed(before, after)
    opened = f"{before}\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"expected a system turn before the user's in a prompt that brings its own "
                                         r"chat template, got none, and the text encoder of .* cuts off a first turn"):
        encoder.places(opened, "platypus")


# --------------------------------------------------------------------------------------------------- one encoder each

@pytest.fixture(scope="module")
def qwen() -> Encoder:
    return Encoder("qwen")


def test_system_prompt_of_lumina() -> None:
    """Words before <Prompt Start> are not the prompt's, and only where it stands."""
    encoder = Encoder("lumina")
    text = f"you are a red assistant <Prompt Start> {PROMPT}"
    other = f"you are a red assistant <Prompt Start> {OTHER}"
    assert encoder.places(text, "platypus") == encoder.changed(text, other)
    assert encoder.places(text, "red") == encoder.places(text, "a red")[1:]
    for word in ("assistant", "start", "prompt"):
        with pytest.raises(ValueError, match=f"finds no '{word}' in the prompt; .* a, photo, of, red, platypus, in, "
                                             "the, snow.$"):
            encoder.factors(text, word)
    assert len(encoder.places("prompt start, assistant", "start")) > 0


def test_quoted_text_of_longcat() -> None:
    """Read letter by letter; more than 512 tokens are cut off."""
    encoder = Encoder("longcat")
    text = "a sign 'platypus' that says \"{}\" in red"
    assert encoder.places(text.format("snow"), "snow") == encoder.changed(text.format("snow"), text.format("bird"))
    assert len(encoder.places(text.format("snow"), "snow")) == 4
    long = " ".join([FILLER] * 52)
    with pytest.raises(ValueError, match="finds no 'platypus' in the prompt"):
        encoder.factors(f"{long} platypus", "platypus")


def test_chat_that_a_user_wrote(qwen: Encoder) -> None:
    """A prompt that brings its own template is read without: the user's turn alone is words."""
    chat = ("<|im_start|>system\nDescribe a cat:<|im_end|>\n<|im_start|>user\na red {} here<|im_end|>\n"
            "<|im_start|>assistant\n")
    before, after = (chat.format(word) for word in ("platypus", "quokka"))
    assert qwen.places(before, "platypus") == qwen.changed(before, after)
    for word in ("cat", "user", "assistant", "system"):
        with pytest.raises(ValueError, match=f"finds no '{word}' .* sees them: a, red, platypus, here.$"):
            qwen.factors(before, word)


def test_another_length_is_refused(qwen: Encoder) -> None:
    """Also where places are counted from the end: NegPip makes a text twice as long."""
    tokens = qwen.encode(PROMPT)[0].shape[1]
    for got in (2 * tokens, tokens - 3, tokens + 4):
        with pytest.raises(ValueError, match=f"expected {tokens} tokens for this prompt from the text encoder of Qwen-"
                                             f"Image, got {got}; connect it as it was loaded, before a node that"):
            read_prompt(qwen.clip, PROMPT, {TEXT: got})


def test_two_texts_of_hidream() -> None:
    encoder = Encoder("hidream")
    (before, one), (after, two) = encoder.encode(PROMPT), encoder.encode(OTHER)
    places = [{*encoder.places(PROMPT, "platypus", rows), *encoder.places(OTHER, "quokka", rows)}
              for rows in (TEXT, LLAMA)]
    assert sorted(places[0]) == changed(before[0], after[0])
    llama = [entry[LLAMA][0].movedim(1, 0) for entry in (one, two)]  # [tokens, layers, channels]
    assert sorted(places[1]) == changed(*llama) and len(places[1]) > 2
    assert list(encoder.factors(PROMPT, "platypus")) == [TEXT, LLAMA]

    long = f"{' '.join([FILLER] * 13)} a platypus"  # behind T5's 128 tokens, not behind Llama's
    assert encoder.places(long, "platypus") == [] and encoder.places(long, "platypus", LLAMA)
    encoder.clip.cond_stage_model.llama = None
    with pytest.raises(ValueError, match="expected 'platypus' among the words that the model reads, got it behind "
                                         "them; shorten the prompt"):
        place_scales(read_prompt(encoder.clip, long, {TEXT: 128, LLAMA: 1}), [("platypus", [0.5])])


def test_anima_reads_rows_of_t5_tokens() -> None:
    """Its conditioning holds Qwen's rows; the model makes rows of T5's tokens of them."""
    encoder = Encoder("anima")
    text = "a (red:1.2) {} \\(asleep\\) in the snow"
    before, after = (encoder.encode(text.format(word))[1][T5_IDS] for word in ("platypus", "quokka"))
    assert list(encoder.factors(text.format("platypus"), "platypus")) == [T5_IDS]
    places = encoder.places(text.format("platypus"), "platypus", T5_IDS)
    assert places == (before != after).nonzero().flatten().tolist() and len(places) == 3
    assert encoder.factors(text.format("platypus"), "red")[T5_IDS].shape[1] == len(before)


def test_glyphs_of_hunyuan_image() -> None:
    """Text in quotes is read twice, the second time letter by letter."""
    encoder = Encoder("hunyuan_image")
    text = "a text of \u201c{}\u201d and \"caf\u00e9\", a red {}"
    before, after = text.format("snow", "platypus"), text.format("bird", "platypus")
    assert encoder.places(before, "snow") == encoder.changed(before, after)
    glyphs = [encoder.encode(text)[1][BYT5][0] for text in (before, after)]
    assert encoder.places(before, "snow", BYT5) == changed(*glyphs) and len(changed(*glyphs)) == 4
    assert len(encoder.places(before, "caf\u00e9", BYT5)) == 5
    assert encoder.places(before, "platypus", BYT5) == encoder.places(before, "text", BYT5) == []
    assert list(encoder.factors("no quotes", "no")) == [TEXT]


def test_spaces_that_llama_s_tokenizer_drops() -> None:
    encoder = Encoder("hunyuan_video")
    text = "a (polar:1.2) bear, a bear BREAK and snow"
    assert encoder.places(text, "polar bear") == sorted({
        *encoder.places(text, "polar"), *encoder.places(text, "polar bear")})
    for phrase in ("bear", "a bear", "and snow"):
        assert encoder.places(text, phrase)
    for phrase in ("ear", "polarbear", "describe", "user", "video"):
        with pytest.raises(ValueError, match=f"finds no '{phrase}' in the prompt; choose from its words as the "):
            encoder.factors(text, phrase)
    cafe, bar = (encoder.places("a caf\u00e9 bar", word) for word in ("caf\u00e9", "bar"))
    assert cafe and bar and max(cafe) < min(bar) and encoder.places("a caf\u00e9", "caf\u00e9") == cafe
    with pytest.raises(ValueError, match="from the text encoder of HunyuanVideo, got"):
        encoder.factors("a red <|eot_id|> cat", "cat")  # the encoder stops there


def test_embeddings(tmp_path: Path) -> None:
    """Before, between and behind words; the host loses spaces of a template behind one."""
    save_file({"emb_params": torch.ones(3, 32)}, tmp_path / "three.safetensors")
    for name in ("z_image", "chroma"):
        encoder = Encoder(name)
        tokenizer = getattr(encoder.clip.tokenizer, "qwen3_4b" if name == "z_image" else "clip_t5xxl", None)
        tokenizer = tokenizer or encoder.clip.tokenizer.t5xxl
        tokenizer.embedding_directory, tokenizer.embedding_size = str(tmp_path), 32
        for text in ("a embedding:three red {} here", "red {} , embedding:three snow", "embedding:three , red {}"):
            before, after = (text.format(word) for word in ("platypus", "quokka"))
            assert encoder.places(before, "platypus") == encoder.changed(before, after)
            places = encoder.places(before, "embedding:three")
            assert places == list(range(places[0], places[0] + 3))
