"""Text encoders: which of their tokens a model's attention reads, where these stand, and what stands around a prompt.

An encoder is known by the names of its tokenizers in what the host's CLIP makes of a text, so that a host which lacks
one loses that one only.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..networks import is_kind

TEXT = ""  # where a conditioning's own rows are; others are in one of its options
LLAMA, BYT5, T5_IDS = "conditioning_llama3", "conditioning_byt5small", "t5xxl_ids"
AXES = {LLAMA: 2, BYT5: 1, T5_IDS: 0}  # of the tokens in those options
FAMILIES = (
    "SD1.x to SDXL, SD3, Flux, Flux.2, Chroma, Qwen-Image, Z-Image, Lumina 2, Krea 2, HiDream, OmniGen2, AuraFlow, "
    "LongCat-Image, Anima, Cosmos, Wan, LTX-Video, HunyuanVideo or HunyuanImage")
PEOPLE = {  # what people call them, by the name of the host's tokenizer
    "SD1": "SD1.x", "SD2": "SD2.x", "SDXL": "SDXL", "SD3": "SD3", "Flux2": "Flux.2", "Klein": "Flux.2 Klein",
    "Klein8B": "Flux.2 Klein", "QwenImage": "Qwen-Image", "LongCatImage": "LongCat-Image", "ZImage": "Z-Image",
    "HunyuanImage": "HunyuanImage", "Ovis": "Ovis-Image", "Krea2": "Krea 2", "Omnigen2": "OmniGen2",
    "Lumina": "Lumina 2", "AuraT5": "AuraFlow", "WanT5": "Wan", "LTXVT5": "LTX-Video", "CosmosT5": "Cosmos",
    "PixArt": "Chroma or PixArt", "HunyuanVideo15": "HunyuanVideo 1.5", "Hydit": "HunyuanDiT", "LTXAVGemma": "LTX-2",
    "MageFlow": "Mage-Flow", "Ernie": "ERNIE-Image", "JoyImage": "JoyImage", "HiDreamO1": "HiDream-O1",
    "SAT5": "Stable Audio",
}
LONGCAT = "comfy.text_encoders.longcat_image.LongCatImageTokenizer"
PICTURE = "<|vision_start|>"  # opens a picture among a prompt's tokens
EDIT = (  # what the host's TextEncodeQwenImageEditPlus writes before its pictures
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n")
PROMPT_START = "<Prompt Start>"  # ends the system prompt that people write before a prompt for Lumina 2


@dataclass(frozen=True)
class Reader:
    """A tokenizer whose tokens a model's attention reads.

    Attributes:
        name: of its tokens in what the host's CLIP makes of a text.
        rows: where their rows are: TEXT, or an option of the conditioning.
        module: what the encoder lacks where it was loaded without this part; its rows mean nothing then.
        cut: the encoder leaves out what stands before the prompt in its template.
        first_chunk: it reads no more than its tokenizer's first chunk.
        quotes: it reads only what stands in quotes.
        marker: what ends a system prompt that the user writes.
    """

    name: str
    rows: str = TEXT
    module: str = "-"
    cut: bool = False
    first_chunk: bool = False
    quotes: bool = False
    marker: str = ""


@dataclass(frozen=True)
class Place:
    """Where the tokens of a reader lie in its rows: from `first` on (below 0 if their front is cut), so many."""

    reader: Reader
    first: int
    count: int


# By the names of the tokenizers: groups of readers one behind the other; those of a group lie side by side in channels.
READERS: dict[frozenset[str], tuple[tuple[Reader, ...], ...]] = {
    frozenset(names.split()): groups for names, groups in {
        "l": ((Reader("l"),),), "g": ((Reader("g"),),), "h": ((Reader("h"),),),
        "g l": ((Reader("l"), Reader("g")),),
        "g l t5xxl": ((Reader("l", module="clip_l"), Reader("g", module="clip_g")),
                      (Reader("t5xxl", module="t5xxl"),)),
        "l t5xxl": ((Reader("t5xxl"),),),  # CLIP gives the pooled vector only
        "g l llama t5xxl": ((Reader("t5xxl", module="t5xxl", first_chunk=True),),
                            (Reader("llama", rows=LLAMA, module="llama"),)),
        "t5xxl": ((Reader("t5xxl"),),), "pile_t5xl": ((Reader("pile_t5xl"),),), "umt5xxl": ((Reader("umt5xxl"),),),
        "gemma2_2b": ((Reader("gemma2_2b", marker=PROMPT_START),),),
        "mistral3_24b": ((Reader("mistral3_24b"),),), "qwen25_3b": ((Reader("qwen25_3b"),),),
        "qwen3_4b": ((Reader("qwen3_4b"),),), "qwen3_8b": ((Reader("qwen3_8b"),),),
        "qwen25_7b": ((Reader("qwen25_7b", cut=True),),),
        "byt5 qwen25_7b": ((Reader("qwen25_7b", cut=True),), (Reader("byt5", rows=BYT5, quotes=True),)),
        "l qwen25_7b": ((Reader("qwen25_7b", cut=True),),), "qwen3vl_4b": ((Reader("qwen3vl_4b", cut=True),),),
        "qwen3_2b": ((Reader("qwen3_2b", cut=True),),), "l llama": ((Reader("llama", cut=True),),),
        "qwen3_06b t5xxl": ((Reader("t5xxl", rows=T5_IDS),),),  # its adapter makes a row for each T5 token
    }.items()
}


def name_encoder(tokenizer: Any) -> str:
    """What people call the text encoder that a tokenizer of the host's belongs to."""
    own = type(tokenizer).__name__.removesuffix("Tokenizer")
    return PEOPLE.get(own, own)


def count_rows(text: Any, options: Mapping[str, Any]) -> dict[str, int]:
    """Rows of a conditioning [B, tokens, channels] and of those of its options that hold rows of tokens."""
    return {TEXT: text.shape[1], **{name: options[name].shape[axis] for name, axis in AXES.items() if name in options}}


def place_readers(clip: Any, encoded: Mapping[str, list[Any]], rows: Mapping[str, int]) -> list[Place]:
    """Where the tokens that reach attention lie; none for a text encoder that is not known here.

    Args:
        encoded: what the host's CLIP makes of a text; rows: see `count_rows`.
    """
    places: list[Place] = []
    ends: dict[str, int] = {}
    for group in READERS.get(frozenset(encoded), ()):
        present = [reader for reader in group if reader.rows in rows
                   and getattr(clip.cond_stage_model, reader.module, True) is not None]
        if not present:
            continue
        where = present[0].rows
        behind = count_behind(clip.tokenizer, present[0].name, encoded)
        count = min(sum(map(len, encoded[reader.name])) for reader in present) - behind
        first = rows[where] - count if present[0].cut else ends.get(where, 0)
        places += [Place(reader, first, count) for reader in present]
        ends[where] = first + count
    return places


def count_behind(tokenizer: Any, name: str, encoded: Mapping[str, list[Any]]) -> int:
    """Tokens of its template's end that the encoder leaves out."""
    if not is_kind(tokenizer, LONGCAT):
        return 0
    tokens = [token for chunk in encoded[name] for token, *_ in chunk][::-1]
    end = next((word for word, piece in getattr(tokenizer, name).inv_vocab.items() if piece == "<|im_end|>"), None)
    return tokens.index(end) + 1 if end in tokens else 0


def find_template(tokenizer: Any, name: str) -> tuple[str, str]:
    """What the host's tokenizer writes before and behind a prompt; CLIP beside a language model gets no template."""
    if is_kind(tokenizer, LONGCAT):
        return (getattr(tokenizer, "T2I_PREFIX", None) or tokenizer.longcat_template_prefix,
                getattr(tokenizer, "SUFFIX", None) or tokenizer.longcat_template_suffix)
    front, _, end = ("{}" if name == "byt5" else getattr(tokenizer, "llama_template", "{}")).partition("{}")
    return front, end


def takes_pictures(tokenizer: Any, name: str) -> bool:
    """Whether pictures may stand before the prompt, in a template that ends as that without them."""
    if is_kind(tokenizer, LONGCAT):
        return hasattr(tokenizer, "EDIT_PREFIX")
    template = getattr(tokenizer, "llama_template_images", "")
    return "{}" in template and template.partition("{}")[2] == find_template(tokenizer, name)[1]


def open_pictures(tokenizer: Any) -> list[str]:
    """What a prompt with pictures may begin with, up to the first: as its tokenizer and the host's nodes write it."""
    if is_kind(tokenizer, LONGCAT):
        return [tokenizer.EDIT_PREFIX.partition(PICTURE)[0] + PICTURE]
    own = tokenizer.llama_template_images.partition(PICTURE)[0] + PICTURE
    return [own, *(f"{EDIT}Picture {number}: {PICTURE}" for number in (1, 2, 3))]


def tells_words(tokenizer: Any) -> bool:
    """Whether a tokenizer of the host's that gives no word ids gives them for its padding, at least."""
    return is_kind(tokenizer, LONGCAT)
