"""Words of a prompt and the tokens that stand for them in a conditioning, as each family's own tokenizer has them."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..samplers.wording import legible
from .spelling import UNKNOWN, Spelled

LIMIT = 10.0  # largest factor either way
LISTED = 400  # letters of the words that a message lists
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
VALUES = re.compile(rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*,?\s*\]|{NUMBER}")
# What a word is made of: a run of letters and their marks, a digit (CLIP splits numbers), a sign, or a letter of a
# script without spaces. An embedding is one part.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
NAME = r"embedding:([^\s<\[():,]+)"
PARTS = re.compile(rf"{NAME}|[{CJK}]|(?:[^\W\d_{CJK}]|[\u0300-\u036f{UNKNOWN}])+|\d|[^\w\s]|_")
EMBEDDING = re.compile(rf"(?:(?<=[\s()])|^){NAME}")
Scale = tuple[str, list[float]]  # a phrase and its factors


@dataclass(frozen=True)
class Part:
    """A part of a word: its letters without case, and the positions of its tokens in their rows."""

    text: str
    tokens: frozenset[int]


@dataclass(frozen=True)
class Reading:
    """A prompt as one of the text encoder's tokenizers reads it.

    Attributes:
        encoder: the tokenizer's name.
        rows: where its tokens have rows: in the conditioning itself, or in an option of it.
        length: of those rows, in tokens.
        partial: it reads some words of the prompt only, those in quotes.
        after_pictures: pictures stand before the prompt in those rows.
    """

    encoder: str
    rows: str
    length: int
    parts: list[Part]
    partial: bool = False
    after_pictures: bool = False


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


def place_scales(readings: Sequence[Reading], scales: Sequence[Scale]) -> dict[str, Tensor]:
    """Factors [values, tokens] for a conditioning's rows, and for its options' rows: 1 but for tokens of the phrases.

    A token in two phrases has the product of their factors.

    Args:
        readings: the prompt as each tokenizer reads it; the first one's rows come first in the result.

    Raises:
        ValueError: if a phrase is not in the prompt.
    """
    values = max([1, *(len(given) for _, given in scales)])
    factors = {reading.rows: torch.ones(values, reading.length) for reading in readings}
    for phrase, given in scales:
        for rows, tokens in find_tokens(readings, phrase).items():
            factors[rows][:, sorted(tokens)] *= rearrange(torch.tensor(given), "values -> values 1")
    return factors


def find_tokens(readings: Sequence[Reading], phrase: str) -> dict[str, set[int]]:
    """The tokens of a phrase wherever it occurs in a prompt, by where their rows are.

    Raises:
        ValueError: if a tokenizer does not read the phrase, or none has a row for it.
    """
    places: dict[str, set[int]] = {}
    for reading in readings:
        found = find_phrase(reading.parts, phrase)
        if not found and not reading.partial:
            raise ValueError(
                f"Token Attention Scale finds no '{legible(phrase)}' in the prompt; choose from its words as the "
                f"tokenizer {reading.encoder} sees them: {list_words(reading.parts)}.")
        places.setdefault(reading.rows, set()).update(*found)
    if not any(places.values()):
        raise ValueError(
            f"Token Attention Scale expected '{legible(phrase)}' among the words that the model reads, got it behind "
            f"them; shorten the prompt.")
    return places


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
