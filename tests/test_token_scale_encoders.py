"""Words of a prompt in what today's text encoders make of it: exactly the rows that a word's change alters."""
from __future__ import annotations

from typing import Any

import nodes as core
import pytest
import torch
from encoders import MODERN, PECULIAR_ENCODERS, text_encoder
from mixology.host.families.encoders import T5_IDS, TEXT, count_rows
from mixology.host.prompts import read_prompt
from mixology.host.words import place_scales
from torch import Tensor

PROMPT = "a photo of a red platypus in the snow"
OTHER = PROMPT.replace("platypus", "quokka")
FILLER = "one two three four five six seven eight nine ten"
TEMPLATED = [name for name in MODERN if name not in ("chroma", "cosmos", "ltxv", "wan", "aura", "lumina")]


@pytest.fixture(scope="module", params=MODERN)
def encoder(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, text_encoder(request.param)


def encode(clip: Any, text: str) -> tuple[Tensor, dict[str, Any]]:
    return core.CLIPTextEncode().encode(clip, text)[0][0]


def factors_of(clip: Any, text: str, phrase: str) -> dict[str, Tensor]:
    return place_scales(read_prompt(clip, text, count_rows(*encode(clip, text))), [(phrase, [0.5])])


def places_of(clip: Any, text: str, phrase: str, rows: str = TEXT) -> list[int]:
    return (factors_of(clip, text, phrase)[rows][0] == 0.5).nonzero().flatten().tolist()


def changed(before: Tensor, after: Tensor) -> list[int]:
    """Rows [tokens, ...] that changed by more than a third of the largest change."""
    change = (before - after).flatten(1).abs().amax(-1)
    return (change > change.max() / 3).nonzero().flatten().tolist()


def test_positions_are_where_the_encoded_text_changes(encoder: tuple[str, Any]) -> None:
    name, clip = encoder
    before, after = encode(clip, PROMPT)[0][0], encode(clip, OTHER)[0][0]
    places = {*places_of(clip, PROMPT, "platypus"), *places_of(clip, OTHER, "quokka")}  # Llama glues other words to it
    assert sorted(places) == changed(before, after)
    assert name == "hunyuan_video" or places == {*places_of(clip, PROMPT, "platypus")}
