"""What Image Mixer and the demo nodes are handed: pictures that are none, half characters, names that are no text."""
from __future__ import annotations

import io as streams
import math
import sys
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from mixer_rig import load_text, text_state, vision
from mixology.host import demo
from mixology.host.mixer import mix_image, mix_text
from mixology.nodes.demo import DemoCheckpoint, DemoPicture
from mixology.nodes.mixer import MixerImage, MixerText
from mixology.samplers.mixer import add_source

WHOLE = (0.0, 0.0, 1.0, 1.0)
PICTURE = torch.rand(1, 40, 56, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vision(tmp_path_factory.mktemp("vision"), projection_dim=16)


def pipe_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piped console of Windows."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, streams.TextIOWrapper(streams.BytesIO(), encoding="cp1252"))


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 2), (1, 8, 8, 0), (8, 8, 3), (8, 8), ()])
def test_a_picture_that_is_none(tower: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="^Mixer Image expected pictures of batch x height x width x channels with "):
        MixerImage.execute(tower, torch.zeros(shape), 1.0, *WHOLE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_picture_of_no_numbers(tower: Any, value: float) -> None:
    image = PICTURE.clone()
    image[0, 3, 3, 1] = value
    with pytest.raises(ValueError, match=r"values from 0 to 1, got some that are no numbers \(NaN or infinite\)"):
        mix_image(tower, image, 1.0, WHOLE, None)


def test_grey_is_read_as_grey_and_more_channels_as_three(tower: Any) -> None:
    grey = PICTURE[..., :1]
    for image, same in ((grey, grey.repeat(1, 1, 1, 3)), (torch.cat([PICTURE, grey, grey], dim=3), PICTURE)):
        before = image.clone()
        one, two = (mix_image(tower, part, 1.0, WHOLE, None)[0].embedding for part in (image, same))
        assert torch.equal(one, two) and torch.equal(image, before)


def test_an_embedding_of_no_numbers() -> None:
    with pytest.raises(ValueError, match=r"^The mixer expected an embedding of numbers, got NaN or infinite ones;"):
        add_source((), torch.full((1, 4), math.nan), 1.0)


def test_half_a_character_is_one_sentence(tmp_path: Path) -> None:
    clip = load_text(tmp_path / "clip_l.safetensors", text_state())
    for mix in (mix_text, MixerText.execute):
        with pytest.raises(ValueError, match=r"half a character \(\\ud800\) at letter 3; type that part anew"):
            mix(clip, "a \ud800", 1.0, None)
    assert mix_text(clip, "a \u661f \x00", 1.0, None)[0].embedding.isfinite().all()


# ------------------------------------------------------------------------------------------ the demo world

def test_the_demo_clip_says_what_half_a_character_is(checkpoints: Any) -> None:
    _, clip, _ = checkpoints("shapes")
    with pytest.raises(ValueError, match=r"The text of a prompt expects a text, got half a character \(\\udfff\)"):
        clip.tokenize("a red \udfff")
    assert clip.tokenize("a \u661f")


@pytest.mark.parametrize("word", ["\u661f", "\x00", "\u2028" * 3 + "x", "z" * 10 ** 5])
def test_a_caption_is_quoted_legibly(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    pipe_windows(monkeypatch)
    with pytest.raises(ValueError, match="Demo Picture knows shapes .* got '.*'; write for instance") as caught:
        DemoPicture.execute(f"a {word} star", 0, 64, 64)
    assert str(caught.value).encode("cp1252").decode("cp1252").isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", [7, None, [], ["a", "b"], {"name": "a"}, "\ud800", "\u661f", "[checkpoints] \u661f"])
def test_a_name_that_is_none_of_the_list(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    pipe_windows(monkeypatch)
    told = DemoCheckpoint.validate_inputs(name)
    assert told is True if name is None else str(told).startswith("Demo Checkpoint finds no '")
    with pytest.raises(ValueError, match="^Demo Checkpoint finds no '.*'; choose one of its list") as caught:
        DemoCheckpoint.execute(name)
    assert str(caught.value).encode("cp1252").decode("cp1252").isprintable()
    if name is None:
        assert math.isnan(float(DemoCheckpoint.fingerprint_inputs(name)))


def test_saved_models_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in demo.SAVE_FOLDERS:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, (
            [str(folder)] if name == "checkpoints" else [], folder_paths.supported_pt_extensions))
        folder_paths.filename_list_cache.pop(name, None)
    for i in range(20):
        (folder / f"{i}.safetensors").write_bytes(b"no header" * i)
    (folder / "ours.safetensors").write_bytes(demo.shipped_file("shapes").read_bytes())
    opened: list[Path] = []
    check = demo.check_shapes
    monkeypatch.setattr(demo, "check_shapes", lambda path: opened.append(path) or check(path))
    names = demo.list_names()
    assert names[-1] == "[checkpoints] ours.safetensors" and len(opened) == 21
    assert demo.list_names() == names and len(opened) == 21
    for name in demo.SAVE_FOLDERS:
        folder_paths.filename_list_cache.pop(name, None)
