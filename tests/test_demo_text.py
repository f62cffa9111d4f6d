"""The demo text encoder: SD1.x's tokenizer, chunks, emphasis and embeddings on a small vocabulary."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import folder_paths
import nodes as core
import pytest
import torch
from mixology.demo.world import COLOURS, SHAPES, TEXTURES
from mixology.host import demo
from safetensors.torch import save_file

CAPTION = "a striped red star on a blue background"


@pytest.fixture(scope="module")
def clip() -> Any:
    return demo.load_clip(demo.shipped_file("text"))


def encode(clip: Any, text: str) -> list[Any]:
    return core.CLIPTextEncode().encode(clip, text)[0]


def token_rows(clip: Any, text: str) -> list[list[tuple[int, float]]]:
    return clip.tokenize(text)["l"]


@pytest.mark.seam
def test_known_words_are_one_token_each(clip: Any) -> None:
    text = demo.read_config()["text"]
    start, end = text["bos_token_id"], text["eos_token_id"]
    assert end == text["vocab_size"] - 1
    words = [*SHAPES, *TEXTURES, *COLOURS, "background", "a", "on"]
    ids = []
    for word in words:
        row = [token for token, _ in token_rows(clip, word)[0]]
        assert (row[0], row[2:]) == (start, [end] * 75), word
        ids.append(row[1])
    assert len(set(ids)) == len(words)
    together = [token for token, _ in token_rows(clip, " ".join(words))[0]]
    assert together[1:len(words) + 1] == ids
    shouted = [token for token, _ in token_rows(clip, "RED Star")[0]]
    assert shouted[1:3] == [ids[words.index("red")], ids[words.index("star")]]


@pytest.mark.seam
def test_word_ids_and_unknown_words(clip: Any) -> None:
    row = clip.tokenize("a zebra star", return_word_ids=True)["l"][0]
    end = demo.read_config()["text"]["eos_token_id"]
    inner = [token for token, _, _ in row[1:] if token != end]
    spelled = [clip.tokenizer.clip_l.inv_vocab[token] for token in inner]
    assert len(inner) > 3
    assert "".join(spelled).replace("</w>", " ").split() == ["a", "zebra", "star"]
    assert all(0 <= token < demo.read_config()["text"]["vocab_size"] for token in inner)
    assert torch.isfinite(encode(clip, "a zebra \u661f star")[0][0]).all()


@pytest.mark.seam
@pytest.mark.parametrize(("count", "rows"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_long_prompts_chunk(clip: Any, count: int, rows: int) -> None:
    text = " ".join(random.Random(count).choices([*SHAPES, *COLOURS], k=count))
    assert [len(row) for row in token_rows(clip, text)] == [77] * rows
    assert encode(clip, text)[0][0].shape == (1, 77 * rows, demo.read_config()["text"]["hidden_size"])


@pytest.mark.seam
def test_emphasis_scales_away_from_nothing(clip: Any) -> None:
    assert [weight for _, weight in token_rows(clip, "a (red:1.5) star")[0]][:4] == [1.0, 1.0, 1.5, 1.0]
    plain, strong, nothing = (encode(clip, text)[0][0] for text in ("a red star", "a (red:1.5) star", ""))
    assert torch.allclose(strong[:, 2], nothing[:, 2] + 1.5 * (plain[:, 2] - nothing[:, 2]), atol=1e-5)
    assert torch.equal(strong[:, 3], plain[:, 3])


@pytest.mark.seam
def test_states_are_the_last_after_the_norm(clip: Any) -> None:
    states, pooled = clip.encode_from_tokens(clip.tokenize(CAPTION), return_pooled=True)
    inner = clip.cond_stage_model.clip_l
    tokens = torch.tensor([[token for token, _ in token_rows(clip, CAPTION)[0]]])
    network = inner.transformer.to("cpu")
    expected = network.text_model(tokens)[0]
    assert torch.allclose(states, expected, atol=1e-5)
    end = tokens[0].tolist().index(demo.read_config()["text"]["eos_token_id"])
    assert torch.allclose(pooled, expected[:, end], atol=1e-5)
    normed = core.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    assert not torch.allclose(encode(normed, CAPTION)[0][0], states, atol=1e-3)


@pytest.mark.seam
def test_textual_inversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = demo.read_config()["text"]["hidden_size"]
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    save_file({"clip_l": vectors}, tmp_path / "mine.safetensors")
    listed = ([str(tmp_path)], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", listed)
    clip = demo.load_clip(demo.shipped_file("text"))
    row = token_rows(clip, "a embedding:mine star")[0]
    assert [torch.is_tensor(token) for token, _ in row[:5]] == [False, False, True, True, False]
    assert not torch.allclose(encode(clip, "a embedding:mine star")[0][0], encode(clip, "a star")[0][0], atol=1e-3)
