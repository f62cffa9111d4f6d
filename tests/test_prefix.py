"""Where a filename_prefix leads: into the output folder under a name that is listed, with dates filled in."""
from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from inversion_rig import invert
from mixology.host import prefix as prefixes
from mixology.host.trajectory import Trajectory
from mixology.host.trajectory_file import list_names, save_trajectory
from mixology.nodes.inversion import SaveTrajectory
from trajectory_rig import saved, use_folders

pytestmark = pytest.mark.seam


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Input and output folders of each test's own."""
    yield from use_folders(tmp_path)


@pytest.fixture(scope="module")
def trajectory(model: Any) -> Trajectory:
    with torch.inference_mode():
        return invert(model, tiny.latent(1, 5, 8), 2)


@pytest.mark.parametrize(("prefix", "words"), [
    ("a\x00b", r"letters that a file name can have, got '\\x00' in 'a\\x00b'; leave it out"),
    ("a\nb", r"letters that a file name can have, got '\\n'"),
    ("\ud800", r"letters that a file name can have, got '\\ud800'"),
    ("a" * 300, "names of at most 200 letters, got 'a{77}...'; shorten it"),
    ("kept/" + "a" * 300 + "/b", "names of at most 200 letters"),
    ("\u661f" * 80, "names of at most 200 letters"),
    (".hidden", "and no dot before it or a folder of it .what is hidden is never listed., got '.hidden'; write"),
    (".hidden/it", "no dot before it or a folder of it"),
    ("kept/.it", "no dot before it or a folder of it"),
    ("", "expects a name, and no dot"),
    (".", "expects a name, and no dot"),
    ("/", "expects a name inside the output folder"),
    ("..", "a name inside the output folder, got '..'; leave out '..' and leading slashes"),
    ("%KSampler.seed%", "knows %date:yyyy-MM-dd%, %year%, .* got '%KSampler.seed%'; write out what it stands for"),
    ("a/%Empty Latent.width%x", "got '%Empty Latent.width%'; write out"),
    ("%width%", "got '%width%'; write out"),
])
def test_prefixes_that_make_no_name(trajectory: Trajectory, folders: tuple[Path, Path], prefix: str, words: str,
                                    ) -> None:
    with pytest.raises(ValueError, match=f"filename_prefix .*{words}") as caught:
        save_trajectory(trajectory, prefix)
    assert str(caught.value).isprintable()
    assert list(folders[1].rglob("*")) == []


def test_letters_that_windows_reserves(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "RESERVED", '<>:"|?*')
    with pytest.raises(ValueError, match="letters that a file name can have, got ':' in 'at 12:30'; leave it out"):
        save_trajectory(trajectory, "at 12:30")


def test_dates_are_filled_in(trajectory: Trajectory, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
                             ) -> None:
    now = time.struct_time((2026, 3, 4, 5, 6, 7, 2, 63, 0))
    monkeypatch.setattr(time, "localtime", lambda *_: now)
    for prefix, expected in (
        ("%date:yyyy-MM-dd%/it", "2026-03-04/it"), ("a_%date:yyMMddhhmmss%_b", "a_260304050607_b"),
        ("%date:d.M h_m_s%", "4.3 5_6_7"), ("%year%-%month%/%hour%%minute%%second%", "2026-03/050607"),
        ("%date:%x", "x"), ("100%", "100%"), ("%odd% one", "%odd% one"), ("%date:'at' QQ%", "'at' QQ"),
    ):
        assert saved(trajectory, prefix) == f"{expected}_00001_.safetensors [output]"


@pytest.mark.parametrize("prefix", ["kept/", "kept//it", "./it", "a/../it", "\u661f/\u661f", "it.v2", "mixology\\it"])
def test_files_of_one_prefix_are_counted(trajectory: Trajectory, prefix: str) -> None:
    """None takes the place of another, and all are listed."""
    names = [saved(trajectory, prefix) for _ in range(3)]
    assert len(set(names)) == 3 and list_names() == sorted(names)


def test_the_node_takes_the_prefix_of_the_default(trajectory: Trajectory) -> None:
    default = SaveTrajectory.define_schema().inputs[1].default
    assert SaveTrajectory.execute(trajectory, default).ui["trajectories"] == [
        {"filename": "trajectory_00001_.safetensors", "subfolder": "mixology", "type": "output"}]
