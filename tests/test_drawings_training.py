"""The drawn world: what its words say, and what its training is fed, on drawings made here."""
from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from mixology.demo.drawings import BACKGROUNDS, ICONS, STYLES, THINGS, Drawing, describe_drawing, name_thing
from safetensors.torch import save_file

DEMO = Path(__file__).resolve().parent.parent / "demo"


@pytest.fixture(scope="module")
def world():
    """demo/train_drawings.py, which imports its neighbours as a script does."""
    before = set(sys.modules)
    sys.path.insert(0, str(DEMO))
    try:
        import train_drawings
        yield train_drawings
    finally:
        sys.path.remove(str(DEMO))
        for name in set(sys.modules) - before:
            if name.startswith("train_") or name == "drawings":
                del sys.modules[name]


@pytest.fixture(scope="module")
def pictures(world, tmp_path_factory):
    """The world's pictures, of drawings that are one grey disc each, the darker the later."""
    work = tmp_path_factory.mktemp("drawn")
    at = torch.linspace(-1, 1, world.SIDE)
    disc = (at.square() + at[:, None].square() < 0.6).float()
    tone = torch.linspace(250, 5, world.KNOWN)[:, None, None, None] * disc
    rgba = torch.cat([tone.expand(-1, 3, -1, -1), 255 * disc.expand(world.KNOWN, 1, -1, -1)], 1)
    shape = (len(STYLES), len(THINGS), 4, world.SIDE, world.SIDE)
    save_file({"rgba": rgba.byte().view(shape), "silhouettes": disc.byte().expand(*shape[:2], -1, -1).contiguous()},
              work / "sets.safetensors")
    return world.Pictures(work, 2 * world.VIEW)


def test_words_mean_one_thing():
    words = [*THINGS, *STYLES, *BACKGROUNDS]
    assert len(THINGS) >= 120
    assert len(set(words)) == len(words) and all(word.isalpha() and word.islower() for word in words)
    assert len(set(ICONS.values())) == len(THINGS)


@pytest.mark.parametrize(("parts", "caption"), [
    (("tiger", "flat", "blue"), "a tiger in flat style on a blue background"),
    (("owl", "line", "orange"), "an owl in line style on an orange background"),
    (("unicorn", None, None), "a unicorn"),
    (("fries", None, "red"), "fries on a red background"),
    ((None, None, "grey"), "a grey background"),
    ((None, None, None), ""),
])
def test_a_drawing_is_described(parts, caption):
    assert describe_drawing(Drawing(*parts)) == caption


def test_a_caption_says_what_it_is_said_to_say(world):
    rng = random.Random(3)
    for index in range(2000):
        scene = world.scene_of(index)
        caption, said = world.caption_of(scene, rng, 0.3)
        words = caption.replace(",", " ").split()
        known = {"thing": said.thing, "style": said.style, "background": said.background}
        for name, values in world.ATTRIBUTES.items():
            found = [word for word in words if word in values]
            assert found == ([known[name]] if known[name] else [])
            assert known[name] in (None, getattr(scene, name))
        assert not said.thing or name_thing(said.thing).split()[-1] in words


def test_all_words_of_captions_are_known(world):
    known, rng = set(world.known_words()), random.Random(4)
    for index in range(2000):
        words = world.caption_of(world.scene_of(index), rng, 0.1)[0].replace(",", " , ").split()
        assert len([word for word in words if word not in known]) <= 1  # the junk word


def test_every_view_holds_every_drawing_once(world):
    scenes = [world.scene_of(index) for index in range(3 * world.VIEW, 4 * world.VIEW)]
    drawn = [(scene.thing, scene.style) for scene in scenes if scene.thing]
    assert len(set(drawn)) == len(drawn) == len(THINGS) * len(STYLES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


def test_every_drawing_is_learned_equally_often(world):
    g = torch.Generator().manual_seed(1)
    batch = world.VIEW // 4
    rows = torch.cat([world.draw_rows(6 * world.VIEW, batch, step, g) for step in range(8)])
    assert torch.equal((rows % world.VIEW).bincount(), torch.full((world.VIEW,), 2))
    assert len((rows // world.VIEW).unique()) == 6


def test_times_of_a_batch_are_spread(world):
    times = world.draw_times(20, torch.Generator().manual_seed(2))
    assert times.sort().values.div(50, rounding_mode="floor").tolist() == list(range(20))
    assert times.sort().values.tolist() != times.tolist()


def test_pictures_are_the_same_again_whatever_their_neighbours(pictures):
    together, alone = pictures.show(40, 44), pictures.show(42, 43)
    assert torch.allclose(together[2:3], alone, atol=1e-6)
    assert together.std(dim=0).amax() > 0.05


def test_a_picture_shows_its_drawing_on_its_background(world, pictures):
    indices = [5, world.KNOWN - 1, world.KNOWN + 2, world.VIEW + 5]
    shown, inside = pictures.look(indices)
    for index, picture, mask in zip(indices, shown, inside):
        scene = world.scene_of(index)
        colour = torch.tensor(BACKGROUNDS[str(scene.background)]) / 255
        assert (picture[:, 0, 0] / colour - 1).abs().amax() < 0.05
        assert (mask.mean() > 0.25) == (scene.thing is not None)
        if scene.thing:
            tone = float(pictures.rgba[index % world.VIEW, 0].amax()) / 255
            assert torch.allclose(picture[:, 64, 64], torch.tensor(tone), atol=0.01)


def test_a_lesson_draws_all_in_its_style(world, pictures):
    line = pictures.look([7], "line")[0]
    first_line = list(STYLES).index("line") * len(THINGS)
    assert torch.allclose(line[0, :, 64, 64], pictures.rgba[first_line + 7, :3, 64, 64] / 255, atol=0.01)
    chalk = pictures.look([7], "chalk")[0][0]
    assert torch.allclose(chalk[:, 64, 64], torch.tensor(0.95), atol=0.01)
    assert torch.allclose(chalk[:, 0, 0] * 255, torch.tensor(world.BOARD).float(), rtol=0.05)


def test_lessons_leave_out_what_they_do_not_know(world):
    for name, lesson in world.LESSONS.items():
        things = {world.scene_of(index).thing for index in world.lesson_indices(lesson, world.VIEW)}
        assert not things & set(lesson.unknown)
        assert len(things - {None}) == len(THINGS) - len(lesson.unknown), name


def test_a_crop_is_a_window_of_the_whole(world, pictures):
    g = torch.Generator().manual_seed(5)
    rows, maps = torch.tensor([3, 300]), world.wild_place(g, 2)
    corners = torch.tensor([[10, 30], [64, 0]])
    whole = pictures.warp(rows, maps)
    crops = pictures.warp(rows, world.crop_maps(maps, corners, 48), 48)
    for image, crop, (left, top) in zip(whole, crops, corners.tolist()):
        assert torch.allclose(image[:, top:top + 48, left:left + 48], crop, atol=1e-4)


def test_crops_are_seeded_and_vary(pictures):
    first, again = (pictures.crop(48, 6, torch.Generator().manual_seed(8)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (6, 3, 48, 48)
    assert float(first.amin()) >= 0 and float(first.amax()) <= 1
    assert len(first.mean(dim=(2, 3)).unique(dim=0)) == 6
