"""Words of a prompt and the tokens that stand for them in a conditioning, as each family's own tokenizer has them."""
from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..samplers.wording import legible

LIMIT = 10.0  # largest factor either way
LISTED = 400  # letters of the words that a message lists
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
VALUES = re.compile(rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*,?\s*\]|{NUMBER}")
UNKNOWN = "\ufffd"  # stands for letters that a tokenizer does not know
# What a word is made of: a run of letters and their marks, a digit (CLIP splits numbers), a sign, or a letter of a
# script without spaces. An embedding is one part.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
NAME = r"embedding:([^\s<\[():,]+)"
PARTS = re.compile(rf"{NAME}|[{CJK}]|(?:[^\W\d_{CJK}]|[\u0300-\u036f{UNKNOWN}])+|\d|[^\w\s]|_")
EMBEDDING = re.compile(rf"(?:(?<=[\s()])|^){NAME}")
FAMILIES = "SD1.x, SD2.x, SDXL, SD3, Flux or Qwen-Image"
ENCODERS = {  # what people call them, by the name of the host's tokenizer
    "SD1": "SD1.x", "SD2": "SD2.x", "SDXL": "SDXL", "SD3": "SD3", "Flux2": "Flux.2", "Klein": "Flux.2 Klein",
    "Klein8B": "Flux.2 Klein", "QwenImage": "Qwen-Image", "LongCatImage": "LongCat-Image", "ZImage": "Z-Image",
    "HunyuanImage": "HunyuanImage", "Ovis": "Ovis-Image", "Krea2": "Krea 2", "Omnigen2": "OmniGen2",
}
TEMPLATE_END = "<|im_end|>"  # closes the prompt in a chat template
# Byte-level tokenizers write a byte as a letter: a visible one as itself, the others from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SPACE = "\u0120"
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + index): byte for index, byte in enumerate(HIDDEN)}

Scale = tuple[str, list[float]]  # a phrase and its factors
Spelled = list[tuple[str, frozenset[int]]]  # characters, and the tokens they come from


@dataclass(frozen=True)
class Part:
    """A part of a word: its letters without case, and the positions of its tokens in the conditioning."""

    text: str
    tokens: frozenset[int]


# --------------------------------------------------------------------------------------------------- lines

def parse_scales(text: str) -> list[Scale]:
    """Lines `phrase = s` or `phrase = [s, s, ...]`. Empty lines are passed over.

    Raises:
        ValueError: for a line that reads otherwise, a factor beyond +-10, or lists of unequal length.
    """
    scales = [parse_line(line) for line in map(str.strip, text.splitlines()) if line]
    lengths = {len(factors) for _, factors in scales} - {1}
    if len(lengths) > 1:
        raise ValueError(
            f"Token Attention Scale expected lists of one length, got {sorted(lengths)}; give every list one value for "
            f"each image of the batch.")
    return scales


def parse_line(line: str) -> Scale:
    """A line `phrase = s` or `phrase = [s, s, ...]`; raises ValueError for one that reads otherwise, or beyond +-10."""
    phrase, _, values = (part.strip() for part in line.rpartition("="))
    if not phrase or not VALUES.fullmatch(values):
        raise ValueError(
            f"Token Attention Scale expected lines such as 'tiger = -1.5' or 'tiger = [-1, 0, 1]', got "
            f"'{legible(line)}'; write one phrase, '=' and its value.")
    factors = [float(value) for value in re.findall(NUMBER, values)]
    if max(map(abs, factors)) > LIMIT:
        raise ValueError(
            f"Token Attention Scale expected values from -{LIMIT:g} to {LIMIT:g}, got '{legible(line)}'; choose a "
            f"smaller one.")
    return phrase, factors


def place_scales(clip: Any, text: str, scales: list[Scale], tokens: int) -> Tensor:
    """Factors [values, tokens] for the conditioning of a prompt: 1 but for the tokens of the phrases.

    A token in two phrases has the product of their factors.

    Raises:
        ValueError: if a phrase is not in the prompt, or the text encoder's tokens cannot be told apart.
    """
    factors = torch.ones(max([1, *(len(values) for _, values in scales)]), tokens)
    prompts = read_prompt(clip, text, tokens) if scales else []
    for phrase, values in scales:
        factors[:, find_tokens(prompts, phrase)] *= rearrange(torch.tensor(values), "values -> values 1")
    return factors


def find_tokens(prompts: list[tuple[str, list[Part]]], phrase: str) -> list[int]:
    """The tokens of a phrase wherever it occurs in a prompt.

    Args:
        prompts: the prompt as each tokenizer reads it; see `read_prompt`.

    Raises:
        ValueError: if one of them does not read the phrase.
    """
    places: set[int] = set()
    for encoder, parts in prompts:
        found = find_phrase(parts, phrase)
        if not found:
            raise ValueError(
                f"Token Attention Scale finds no '{legible(phrase)}' in the prompt; choose from its words as the "
                f"tokenizer {encoder} sees them: {list_words(parts)}.")
        places.update(*found)
    return sorted(places)


# --------------------------------------------------------------------------------------------------- words

def split_parts(spelled: Spelled) -> list[Part]:
    """The parts of a spelled prompt, in order."""
    text = "".join(letter for letter, _ in spelled)
    return [Part(fold(match.group()), frozenset().union(*(owner for _, owner in spelled[slice(*match.span())])))
            for match in PARTS.finditer(text)]


def fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def find_phrase(parts: list[Part], phrase: str) -> list[frozenset[int]]:
    """The tokens of each occurrence of a phrase. A number is found whole only, like a word."""
    wanted = [fold(match.group()) for match in PARTS.finditer(phrase)]
    found = []
    for start in range(len(parts) - len(wanted) + 1 if wanted else 0):
        end = start + len(wanted)
        inside = all(reads_as(part.text, word) for part, word in zip(parts[start:end], wanted))
        if inside and not cuts_number(parts, start) and not cuts_number(parts, end):
            found.append(frozenset().union(*(part.tokens for part in parts[start:end])))
    return found


def reads_as(text: str, word: str) -> bool:
    """Whether a part may be this word. T5 does not know every letter, but those of ASCII and some of any word."""
    known = text.split(UNKNOWN)
    return any(known) and bool(re.fullmatch(r"[^\x00-\x7f]*".join(map(re.escape, known)), word))


def cuts_number(parts: list[Part], place: int) -> bool:
    return 0 < place < len(parts) and parts[place - 1].text.isdigit() and parts[place].text.isdigit()


def list_words(parts: list[Part]) -> str:
    """The words of a prompt, each once, for an error message."""
    words = dict.fromkeys(part.text for part in parts if any(map(str.isalnum, part.text)))
    return legible(", ".join(words), LISTED) if words else "none"


# --------------------------------------------------------------------------------------------------- tokens

def read_prompt(clip: Any, text: str, tokens: int) -> list[tuple[str, list[Part]]]:
    """Parts of a prompt for every tokenizer whose tokens reach the model's attention, by the tokenizer's name.

    Args:
        tokens: length of the conditioning.

    Raises:
        ValueError: for a text encoder whose tokens cannot be placed.
    """
    encoded = clip.tokenize(text, return_word_ids=True)
    places = place_encoders(clip.cond_stage_model, encoded, tokens)
    check_encoder(clip, encoded, max((first + count for _, first, count in places), default=0), tokens)
    readings = []
    for name, first, count in places:
        tokenizer = getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}")
        loaded = [found for found in EMBEDDING.findall(text) if has_embedding(tokenizer, found)]
        spelled = spell_prompt(tokenizer, encoded[name], loaded, max(0, -first))
        if first >= 0:
            spelled = cut_template(spelled, getattr(clip.tokenizer, "llama_template", "{}"))
        readings.append((name, split_parts([
            (letter, frozenset(first + place for place in owners if place < count)) for letter, owners in spelled])))
    return readings


def check_encoder(clip: Any, encoded: dict[str, list[Any]], placed: int, tokens: int) -> None:
    """Raises ValueError for a text encoder whose tokens cannot be told apart, or that another node changed.

    Args:
        placed: tokens that its tokenizers explain; tokens: length of the conditioning.
    """
    own = type(clip.tokenizer).__name__.removesuffix("Tokenizer")
    name = f"that of {ENCODERS.get(own, own)}"
    if not all(len(token) == 3 for chunks in encoded.values() for chunk in chunks for token in chunk):
        raise ValueError(
            f"Token Attention Scale expected a text encoder that tells which tokens a word becomes, got {name}, which "
            f"does not; encode with CLIP Text Encode, without scales.")
    if placed == 0:
        raise ValueError(
            f"Token Attention Scale expected a text encoder of {FAMILIES}, got {name}, whose words it cannot place; "
            f"encode with CLIP Text Encode, without scales.")
    if placed != tokens:
        raise ValueError(
            f"Token Attention Scale expected {placed} tokens for this prompt from the text encoder of "
            f"{ENCODERS.get(own, own)}, got {tokens}; connect it as it was loaded, before a node that changes it (such "
            f"as NegPip).")


def place_encoders(encoder: Any, encoded: dict[str, list[Any]], tokens: int) -> list[tuple[str, int, int]]:
    """Where each tokenizer's sequence lies in the conditioning: its name, first position and tokens."""
    lengths = {name: sum(map(len, chunks)) for name, chunks in encoded.items()}
    names = set(encoded)
    if names == {"g", "l"}:  # SDXL: side by side in the channels
        return [(name, 0, min(lengths.values())) for name in ("l", "g")]
    if names == {"l", "t5xxl"}:  # Flux: CLIP gives the pooled vector only
        return [("t5xxl", 0, lengths["t5xxl"])]
    if names == {"g", "l", "t5xxl"}:
        return place_sd3_encoders(encoder, lengths)
    if names == {"qwen25_7b"}:  # Qwen-Image: the front of the chat template is cut off
        return [("qwen25_7b", tokens - lengths["qwen25_7b"], lengths["qwen25_7b"])]
    return [(name, 0, length) for name, length in lengths.items()] if len(names) == 1 else []


def place_sd3_encoders(encoder: Any, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """As `place_encoders` for SD3: CLIP side by side, then T5; any of them may be left out."""
    present = [name for name in ("l", "g") if getattr(encoder, f"clip_{name}", None) is not None]
    cut = min((lengths[name] for name in present), default=0)
    places = [(name, 0, cut) for name in present]
    return places if getattr(encoder, "t5xxl", None) is None else [*places, ("t5xxl", cut, lengths["t5xxl"])]


def spell_prompt(tokenizer: Any, chunks: list[Any], embeddings: list[str], start: int) -> Spelled:
    """The prompt in the tokenizer's own spelling, every character with the positions of its tokens.

    Start, end and padding tokens spell nothing, so that a word cut by the end of a chunk is joined again.

    Args:
        chunks: what the tokenizer returns with word ids: [[(token, weight, word id), ...], ...].
        embeddings: names of the embeddings in it, in order.
        start: first position of the prompt, after the front of a chat template; its end is left out as well.
    """
    groups = group_words(tokenizer, chunks, start)
    loaded = [word for word, group in groups.items() if torch.is_tensor(group[0][0])]
    names = dict(zip(loaded, embeddings if len(loaded) == len(embeddings) else [""] * len(loaded)))
    spelled: Spelled = []
    for word, group in groups.items():
        if word in names:
            owners = frozenset(place for _, place in group)
            spelled += [(letter, owners) for letter in f" embedding:{names[word]} "]
        else:
            spelled += spell_tokens(tokenizer, group)
    return spelled


def group_words(tokenizer: Any, chunks: list[Any], start: int) -> dict[int, list[tuple[Any, int]]]:
    """Tokens of each word of the prompt and their positions, by word id; see `spell_prompt`."""
    groups: dict[int, list[tuple[Any, int]]] = {}
    for token, word, place in list_tokens(tokenizer, chunks):
        if start and place >= start and not torch.is_tensor(token) and tokenizer.inv_vocab[token] == TEMPLATE_END:
            break
        if word and place >= start:
            groups.setdefault(word, []).append((token, place))
    return groups


def cut_template(spelled: Spelled, template: str) -> Spelled:
    """The prompt alone, of a text that was spelled with the template that its tokenizer puts around it.

    Raises:
        ValueError: if the template is not found as it was written.
    """
    front, _, end = template.partition("{}")
    text = "".join(letter for letter, _ in spelled)
    if not text.startswith(front) or not text.endswith(end):
        raise ValueError(
            "Token Attention Scale expected to find the prompt in the text encoder's template, got another spelling "
            "of it; encode with CLIP Text Encode, without scales.")
    return spelled[len(front):len(spelled) - len(end)]


def has_embedding(tokenizer: Any, name: str) -> bool:
    """Whether a mention of an embedding leaves tokens of it in the conditioning."""
    chunks = tokenizer.tokenize_with_weights(f"embedding:{name}", return_word_ids=True)
    return any(torch.is_tensor(token) for token, _, _ in list_tokens(tokenizer, chunks))


def list_tokens(tokenizer: Any, chunks: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """Tokens, their word ids (0 for start, end and padding) and their positions in the encoder's output.

    The encoder leaves out embeddings of another width, and the rest of the chunk moves up.
    """
    first = 0
    for chunk in chunks:
        place = first
        for token, _, word in chunk:
            if not torch.is_tensor(token) or token.shape[-1] == tokenizer.embedding_size:
                yield token, word, place
                place += 1
        first += len(chunk)


def spell_tokens(tokenizer: Any, group: list[tuple[int, int]]) -> Spelled:
    """Letters of a run of tokens. A letter of several tokens belongs to all of them.

    Raises:
        ValueError: for a tokenizer whose spelling is not known.
    """
    vocabulary = tokenizer.inv_vocab.values()
    pieces = [(tokenizer.inv_vocab[token], place) for token, place in group]
    if "a</w>" in vocabulary:  # CLIP: byte-level, with a mark at the end of a word
        return spell_bytes([(piece.replace("</w>", SPACE), place) for piece, place in pieces])
    if f"{SPACE}a" in vocabulary:  # GPT-2's kind: byte-level, with spaces
        return spell_bytes(pieces)
    if "\u2581" in vocabulary:  # SentencePiece: letters, with a mark for the space
        return [(" " if letter == "\u2581" else letter, frozenset([place]))
                for piece, place in pieces for letter in piece.replace("<unk>", UNKNOWN)]
    raise ValueError(
        f"Token Attention Scale expected a CLIP, T5 or Qwen tokenizer, got {type(tokenizer).__name__}; use the text "
        f"encoder that belongs to the model.")


def spell_bytes(pieces: list[tuple[str, int]]) -> Spelled:
    """Letters of byte-level pieces: a letter of several bytes may lie in several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    spelled: Spelled = []
    owners: set[int] = set()
    for piece, place in pieces:
        for letter in piece:
            owners.add(place)
            decoded = decoder.decode(BYTES[letter].to_bytes(1, "big"))
            spelled += [(character, frozenset(owners)) for character in decoded]
            if decoded:
                owners.clear()
    return spelled
