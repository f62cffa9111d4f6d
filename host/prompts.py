"""A prompt as the tokenizers of a text encoder read it, and the conditioning that was made of it."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .families.encoders import (
    AXES,
    FAMILIES,
    TEXT,
    Place,
    count_rows,
    find_template,
    name_encoder,
    open_pictures,
    place_readers,
    takes_pictures,
    tells_words,
)
from .spelling import (
    Spelled,
    cut_before,
    cut_chat,
    cut_quotes,
    cut_template,
    has_embedding,
    loses_first_turn,
    restore_spaces,
    spell_prompt,
)
from .words import NAME, Part, Reading, split_parts

EMBEDDING = re.compile(rf"(?:(?<=[\s()])|^){NAME}")
TURN_TOKENS = 2  # at most, before the line break of a turn's opening, where spaces joined it and the encoder cuts none
LIKENESS = 0.99  # cosine of a row and what it should be: half precision and weights of words stay above


def read_prompt(clip: Any, text: str, rows: Mapping[str, int], elsewhere: bool = False) -> list[Reading]:
    """A prompt as every tokenizer reads it whose tokens reach the model's attention.

    Args:
        rows: of its conditioning; see `count_rows`.
        elsewhere: another node encoded it, maybe with pictures before it; then places are counted from its end.

    Raises:
        ValueError: for a text encoder whose tokens cannot be placed.
    """
    encoded = clip.tokenize(text, return_word_ids=True)
    places = place_readers(clip, encoded, rows)
    check_encoder(clip, encoded, places)
    readings = []
    for place in places:
        name = place.reader.name
        tokenizer = getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}")
        loaded = [found for found in EMBEDDING.findall(text) if has_embedding(tokenizer, found)]
        whole = place.reader.first_chunk
        chunks = tokenizer.tokenize_with_weights(text, return_word_ids=True) if whole else encoded[name]
        spelled = find_prompt(clip, text, place, spell_prompt(tokenizer, chunks, loaded))
        parts = [Part(part.text, frozenset(place.first + token for token in part.tokens if token < place.count))
                 for part in split_parts(spelled)]
        readings.append(Reading(
            encoder=name, rows=place.reader.rows, length=rows[place.reader.rows], parts=parts,
            partial=place.reader.quotes,
            after_pictures=place.reader.cut and follows_pictures(clip, place, spelled, elsewhere)))
    check_length(clip, places, rows, elsewhere)
    return readings


def find_prompt(clip: Any, text: str, place: Place, spelled: Spelled) -> Spelled:
    """The user's own words, of a text as a tokenizer spells it with the template around.

    Raises:
        ValueError: if the template is not found as it was written.
    """
    prompt = cut_template(spelled, *find_template(clip.tokenizer, place.reader.name))
    if prompt is None:
        prompt = cut_chat(spelled)
        if prompt is not None and place.reader.cut and loses_first_turn(spelled):
            raise ValueError(
                f"Token Attention Scale expected a system turn before the user's in a prompt that brings its own chat "
                f"template, got none, and the text encoder of {name_encoder(clip.tokenizer)} cuts off a first turn; "
                f"write '<|im_start|>system', a text and '<|im_end|>' before it, or leave the template out.")
    if prompt is None:
        raise ValueError(
            "Token Attention Scale expected to find the prompt in the text encoder's template, got another spelling "
            "of it; encode with CLIP Text Encode, without scales.")
    if place.reader.quotes:
        return cut_quotes(prompt)
    if place.reader.marker:
        prompt = cut_before(prompt, place.reader.marker)
    return restore_spaces(prompt, text)


# --------------------------------------------------------------------------------------------------- checks

def check_encoder(clip: Any, encoded: Mapping[str, list[Any]], places: Sequence[Place]) -> None:
    """Raises ValueError for a text encoder whose tokens cannot be told apart, or that is not known."""
    name = f"that of {name_encoder(clip.tokenizer)}"
    named = all(len(token) == 3 for chunks in encoded.values() for chunk in chunks for token in chunk)
    if not named and not tells_words(clip.tokenizer):
        raise ValueError(
            f"Token Attention Scale expected a text encoder that tells which tokens a word becomes, got {name}, which "
            f"does not; encode with CLIP Text Encode, without scales.")
    if not places:
        raise ValueError(
            f"Token Attention Scale expected a text encoder of {FAMILIES}, got {name}, whose words it cannot place; "
            f"encode with CLIP Text Encode, without scales.")


def follows_pictures(clip: Any, place: Place, spelled: Spelled, elsewhere: bool) -> bool:
    """Whether more stands before a prompt than a turn's opening; only pictures may, see `check_pictures`.

    Raises:
        ValueError: if it does not begin where the encoder cuts its template's front, and cannot follow pictures.
    """
    letter, first = next(((letter, min(owners)) for letter, owners in spelled if owners), ("", None))
    if first is None or -letter.isspace() <= place.first + first <= TURN_TOKENS:  # a line break alone is cut off
        return False
    if place.first + first > 0 and elsewhere and takes_pictures(clip.tokenizer, place.reader.name):
        return True
    raise mismatch(clip, place.count - first - (letter == "\n"), place.first + place.count, elsewhere)


def check_length(clip: Any, places: Sequence[Place], rows: Mapping[str, int], elsewhere: bool) -> None:
    """Raises ValueError if rows are not as many as the prompt's tokens."""
    for name in dict.fromkeys(place.reader.rows for place in places):
        end = max(place.first + place.count for place in places if place.reader.rows == name)
        if end != rows[name]:
            raise mismatch(clip, end, rows[name], elsewhere)


def mismatch(clip: Any, expected: int, got: int, elsewhere: bool) -> ValueError:
    """What says that a conditioning has another length than the prompt's tokens."""
    encoder = name_encoder(clip.tokenizer)
    if elsewhere:
        return ValueError(
            f"Token Attention Scale expected {expected} tokens in the conditioning of this text from the text encoder "
            f"of {encoder}, got {got}; give the very text and CLIP that it was made with, or connect no conditioning.")
    return ValueError(
        f"Token Attention Scale expected {expected} tokens for this prompt from the text encoder of {encoder}, got "
        f"{got}; connect it as it was loaded, before a node that changes it (such as NegPip).")


# --------------------------------------------------------------------------------------------------- encoded elsewhere

def take_entry(conditioning: list[Any]) -> tuple[Tensor, dict[str, Any]]:
    """The one entry of a conditioning that another node made.

    Raises:
        ValueError: for several entries, or one without a text of tokens.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"Token Attention Scale expected a conditioning of one text, got {len(conditioning)}; connect it before "
            f"nodes that combine prompts.")
    text, options = conditioning[0]
    if not torch.is_tensor(text) or text.ndim != 3:
        raise ValueError(
            "Token Attention Scale expected a conditioning that holds a text, got one without; connect that of a node "
            "that encodes a prompt.")
    return text, options


def check_same(given: tuple[Tensor, dict[str, Any]], own: tuple[Tensor, dict[str, Any]], readings: Sequence[Reading],
               ) -> None:
    """Raises ValueError if the prompt's rows in a conditioning are not those that its text gets.

    Their lengths do not matter, so that nodes which weigh words in a way of their own may have made them.
    """
    counts = [count_rows(*entry) for entry in (given, own)]
    for reading in readings:
        if counts[0][reading.rows] != counts[1].get(reading.rows):
            raise another_text()
        places = sorted(frozenset[int]().union(*(part.tokens for part in reading.parts)))
        rows, expected = (take_rows(entry, reading.rows, places) for entry in (given, own))
        if not same_rows(rows, expected):
            raise another_text()


def check_pictures(clip: Any, text: Tensor, readings: Sequence[Reading]) -> None:
    """Raises ValueError if no picture opens a conditioning [B, tokens, channels] that is longer than its prompt.

    Rows before the first picture depend on nothing behind them, so that any conditioning with one begins with them.
    """
    for name in (reading.encoder for reading in readings if reading.after_pictures):
        for opening in open_pictures(clip.tokenizer):
            tokens = clip.tokenize(opening)
            padding = getattr(clip.tokenizer, name).pad_token
            own = clip.encode_from_tokens_scheduled(tokens)[0][0]
            places = range(own.shape[1] - sum(token == padding for token, *_ in tokens[name][0]))
            if same_rows(take_rows((text, {}), TEXT, places), take_rows((own, {}), TEXT, places)):
                break
        else:
            raise ValueError(
                "Token Attention Scale expected the conditioning of this text, alone or behind pictures as the host's "
                "TextEncodeQwenImageEdit writes them, got another; give the very text and CLIP that it was made with, "
                "or connect no conditioning.")


def another_text() -> ValueError:
    """What says that a conditioning is not that of the text."""
    return ValueError(
        "Token Attention Scale expected the conditioning of this text, got another; give the very text and CLIP that "
        "it was made with, or connect no conditioning.")


def same_rows(rows: Tensor, expected: Tensor) -> bool:
    """Whether rows [tokens, values] point where they should; single values must be equal."""
    return rows.shape == expected.shape and bool(
        (cosine_similarity(rows, expected, dim=-1) >= LIKENESS).all() if rows.shape[-1] > 1
        else (rows == expected).all())


def take_rows(entry: tuple[Tensor, dict[str, Any]], name: str, places: Sequence[int]) -> Tensor:
    """Rows [places, values] of a conditioning, or of its option of that name."""
    text, options = entry
    rows, axis = (text, 1) if name == TEXT else (options[name], AXES[name])
    return rows.movedim(axis, 0).flatten(1)[list(places)].cpu().float() if rows.ndim > 1 else (
        rows[list(places)].cpu().float().unsqueeze(-1))

