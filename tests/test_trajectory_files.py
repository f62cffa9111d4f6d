"""Nothing is lost and nothing is believed: what is inverted comes back, what cannot is refused before it is written,
and a file's numbers are checked as its header is."""
from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from inversion_rig import invert
from mixology.host import trajectory_file, trajectory_format
from mixology.host.trajectory import Trajectory, start_trajectory
from mixology.host.trajectory_file import NO_FILE, find_fault, list_names, load_trajectory, save_trajectory
from mixology.nodes.inversion import LoadTrajectory
from safetensors.torch import save_file
from trajectory_rig import parts_of, refuse, saved, spoil, use_folders

TWO = tiny.latent(2, 5, 8)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Input and output folders of each test's own."""
    yield from use_folders(tmp_path)


@pytest.fixture(scope="module")
def trajectory(model: Any) -> Trajectory:
    return invert(model, {**TWO, "noise_mask": torch.rand(1, 40, 64), "batch_index": [4, 9]}, 3)


def same(one: Any, other: Any) -> bool:
    """In value and type."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


# ------------------------------------------------------------------------------------------ there and back

LATENTS: dict[str, dict[str, Any]] = {
    **{f"mask of {dtype}": {"noise_mask": torch.tensor([[[0, 1], [1, 0]]]).to(dtype)} for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float64)},
    "mask between": {"noise_mask": torch.rand(2, 1, 40, 64, dtype=torch.float64)},
    "mask of two dimensions": {"noise_mask": torch.rand(40, 64)},
    "mask seen twice": {"noise_mask": torch.rand(1, 1, 8).expand(2, 40, 8)},
    "mask turned": {"noise_mask": torch.rand(2, 8, 5).transpose(1, 2)},
    "no mask": {"noise_mask": None},
    **{f"picture of {dtype}": {"samples": TWO["samples"].to(dtype)} for dtype in (
        torch.float64, torch.float16, torch.bfloat16)},
    "picture beside others": {"samples": torch.cat([TWO["samples"]] * 2)[1:3]},
    "an index": {"batch_index": [0, 65535]},
    "an index too long": {"batch_index": [1, 2, 3]},
    "an index too short": {"batch_index": [7]},
    "no index": {"batch_index": None},
    "a kind": {"type": "audio"},
    "entries of another pack": {"info": {"a": [1, 2.5, None, True, {"b": "\u661f"}]}, "\u661f": -1, "empty": []},
}


@pytest.mark.parametrize("case", LATENTS)
def test_what_is_inverted_comes_back(model: Any, case: str) -> None:
    first = invert(model, {**TWO, **LATENTS[case]}, 3)
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in first.latent.items()}
    name = saved(first)
    again = load_trajectory(name)
    assert find_fault(name) is None and list_names() == [name]
    told = {key: value for key, value in first.latent.items() if value is not None}
    assert set(again.latent) == set(told) and all(same(again.latent[key], value) for key, value in told.items())
    assert all(same(getattr(again, part), getattr(first, part)) for part in (
        "sigmas", "states", "end", "levels", "start", "latent_format"))
    assert all(same(first.latent[key], value) for key, value in before.items())
    assert torch.equal(*(start_trajectory(one)[0].generate_noise(one.latent) for one in (first, again)))


@pytest.mark.parametrize("index", [torch.tensor([4, 9]), (4, 9), range(4, 6)])
def test_an_index_of_another_kind_is_a_list(trajectory: Trajectory, index: Any) -> None:
    again = load_trajectory(saved(changed(trajectory, batch_index=index)))
    assert again.latent["batch_index"] == [int(item) for item in index]


def changed(trajectory: Trajectory, **entries: Any) -> Trajectory:
    """One whose latent has other entries; DDIM Inversion looks at the samples alone."""
    return Trajectory(trajectory.sigmas, trajectory.states, {**trajectory.latent, **entries}, trajectory.end,
                      trajectory.latent_format, trajectory.levels, trajectory.start)


LOST: dict[str, tuple[dict[str, Any], str]] = {
    "mask above": ({"noise_mask": torch.tensor([[[0, 255]]], dtype=torch.uint8)}, "noise mask holds values outside 0"),
    "mask below": ({"noise_mask": torch.full((1, 2, 2), -0.1)}, "noise mask holds values outside 0 to 1"),
    "mask of no numbers": ({"noise_mask": torch.full((1, 2, 2), math.nan)}, "noise mask holds values outside 0"),
    "mask of one number": ({"noise_mask": torch.ones(1)}, "noise_mask of F32 1; invert the latent that VAE Encode"),
    "mask of nothing": ({"noise_mask": torch.ones(1, 0, 4)}, "noise_mask of F32 1x0x4"),
    "mask of waves": ({"noise_mask": torch.ones(1, 2, 2, dtype=torch.complex64)}, "noise_mask of torch.complex64"),
    "picture of bytes": ({"samples": torch.ones(2, 4, 5, 8, dtype=torch.uint8)}, "samples of U8 2x4x5x8"),
    "picture of no numbers": ({"samples": torch.full((2, 4, 5, 8), math.nan)}, "expects finite states, got numbers"),
    "index below": ({"batch_index": [-1, 0]}, "batch_index of one number from 0 to 65535 for each"),
    "index above": ({"batch_index": [0, 65536]}, "batch_index of one number from 0 to 65535 for each"),
    "index between": ({"batch_index": [0, 1.5]}, "batch_index of one number from 0 to 65535 for each"),
    "index of words": ({"batch_index": ["a", "b"]}, "batch_index of one number from 0 to 65535 for each"),
    "index of one": ({"batch_index": 7}, "batch_index of one number from 0 to 65535 for each"),
    "index of no number": ({"batch_index": [math.nan, math.inf]}, "batch_index of one number from 0 to 65535 for each"),
    "an object": ({"info": object()}, "samples, noise_mask, batch_index and plain values, got 'info', which the file"),
    "a tensor": ({"raw_x": torch.ones(1)}, "got 'raw_x', which the file cannot hold; invert the latent that VAE"),
    "a key that is none": ({"\ud800": (1, 2)}, r"got '\\ud800', which the file"),
    "no number": ({"info": [math.nan]}, "got 'info', which the file"),
    "lists in lists": ({"info": json.loads("[" * 200 + "]" * 200)}, "got 'info', which the file"),
    "a book": ({"info": "a" * 900_000}, "at most 786432 letters beside the pictures, got 90"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_cannot_come_back_is_refused_before_it_is_written(trajectory: Trajectory, folders: tuple[Path, Path],
                                                               case: str) -> None:
    entries, words = LOST[case]
    with pytest.raises(ValueError, match=words) as caught:
        save_trajectory(changed(trajectory, **entries), "lost/it")
    assert str(caught.value).isprintable() and caught.value.__cause__ is None
    assert list(folders[1].rglob("*")) == []


def test_a_trajectory_too_large_is_refused(trajectory: Trajectory, folders: tuple[Path, Path],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_format, "LARGEST_FILE", 1 << 20)
    with pytest.raises(ValueError, match=r"a trajectory of at most 0\.0 GB, got 0\.0 GB; invert fewer pictures"):
        save_trajectory(trajectory, "large")
    assert list(folders[1].iterdir()) == []


@pytest.mark.parametrize("place", ["save_file", "replace"])
def test_a_failure_leaves_nothing_behind(trajectory: Trajectory, folders: tuple[Path, Path], place: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the file is written, and a folder that lets no file be moved."""
    name = saved(trajectory, "whole")
    before = (folders[1] / name.removesuffix(" [output]")).read_bytes()

    def fail(tensors: Any, path: Path, metadata: Any = None) -> None:
        if place == "save_file":
            path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device", "\u661f\ud800.safetensors")

    monkeypatch.setattr(trajectory_file if place == "save_file" else os, place, fail)
    with pytest.raises(ValueError, match=r"cannot write 'whole' \(.*No space left.*\); make room on the") as caught:
        save_trajectory(trajectory, "whole")
    assert str(caught.value).isprintable() and caught.value.__suppress_context__
    assert [path.name for path in folders[1].iterdir()] == ["whole_00001_.safetensors"]
    assert (folders[1] / "whole_00001_.safetensors").read_bytes() == before


def test_a_file_in_the_way_is_one_sentence(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    (folders[1] / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write 'taken/it' \(.*\); make room on the disk, or choose another"):
        save_trajectory(trajectory, "taken/it")


# ------------------------------------------------------------------------------------------ numbers of a file

NUMBERS: dict[str, tuple[Any, str]] = {
    "mask above": (lambda t, n: t["noise_mask"].add_(1), "noise mask holds values outside 0 to 1"),
    "mask of no numbers": (lambda t, n: t["noise_mask"].div_(0).mul_(0), "noise mask holds values outside 0 to 1"),
    "picture of no numbers": (lambda t, n: t["samples"].div_(0), "finite states, got numbers beyond all bounds"),
    "start below": (lambda t, n: n.update(start=[1.0, n["start"][1] / 2]), "belong together"),
    "start above": (lambda t, n: n.update(start=[1.0, n["start"][1] * 2]), "belong together"),
    "start of a flow": (lambda t, n: n.update(start=[0.0, n["start"][1]]), "belong together"),
    "start of nothing": (lambda t, n: n.update(start=[0.0, 0.0]), "(belong together|starts from a picture)"),
    "other sigmas": (lambda t, n: t["sigmas"].mul_(torch.linspace(1, 2, 4)), "belong together"),
    "other levels": (lambda t, n: n["levels"][1].__setitem__(1, 9.0), "belong together"),
    "signals that rise": (lambda t, n: n["levels"][2].__setitem__(0, 5.0), "belong together"),
    "noise at zero": (lambda t, n: n["levels"][0].__setitem__(1, 1.0), "belong together"),
    "no signal at zero": (lambda t, n: n["levels"][0].__setitem__(0, 0.0), "belong together"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_do_not_belong_together(trajectory: Trajectory, folders: tuple[Path, Path], case: str) -> None:
    change, words = NUMBERS[case]
    refuse(spoil(trajectory, folders[1], change), f"Load Trajectory cannot use 'spoilt_00001_.safetensors': .*{words}",
           at_once=False)


@pytest.mark.parametrize("change", [
    lambda t, n: n.update(batch_index=[0, 10 ** 9]), lambda t, n: n.update(batch_index=[0, -1]),
    lambda t, n: n.update(batch_index=[True, 1]), lambda t, n: n.update(more={"batch_index": [10 ** 9]}),
    lambda t, n: n.update(more={"noise_mask": 1}), lambda t, n: n.update(more=[1]),
    lambda t, n: n.update(latent_format="SD15\n\ud800"), lambda t, n: n.update(more=json.loads("[" * 50 + "]" * 50)),
])
def test_notes_out_of_reason(trajectory: Trajectory, folders: tuple[Path, Path], change: Any) -> None:
    refuse(spoil(trajectory, folders[1], change), "tensors and notes that belong together, but those of 'spoilt")


def test_a_file_of_today_still_loads(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    """As it was written before further entries and types were kept: the same version, and no note more."""
    path = folders[1] / saved(trajectory).removesuffix(" [output]")
    tensors, notes = parts_of(path)
    assert set(notes) == {"version", "latent_format", "levels", "start", "batch_index"} and notes["version"] == 1
    save_file(tensors, folders[0] / "old.safetensors", {"mixology_trajectory": json.dumps(notes)})
    assert torch.equal(load_trajectory("old.safetensors").states, trajectory.states)


@pytest.mark.parametrize("size", [17 * 10 ** 9, 5 * 10 ** 9])
def test_a_file_longer_than_its_header_says(trajectory: Trajectory, folders: tuple[Path, Path], size: int) -> None:
    name = saved(trajectory)
    os.truncate(folders[1] / name.removesuffix(" [output]"), size)
    refuse(name, "is another kind of file; choose one that Save Trajectory wrote")
    os.truncate(folders[1] / name.removesuffix(" [output]"), 10 ** 9)
    refuse(name, "is damaged")
    assert list_names() == []


@pytest.mark.parametrize("side", [23000, 100000])
def test_a_header_of_endless_pictures(folders: tuple[Path, Path], side: int) -> None:
    """17 GB and more of zeros that take no room on the disk, as the header says."""
    shapes = {"sigmas": [2], "states": [2, 1, 4, side, side], "samples": [1, 4, side, side], "end": [1, 4, side, side]}
    notes = {"version": 1, "latent_format": "SD15", "levels": [[1.0, 0.0], [1.0, 1.0]], "start": [1.0, 2 ** 0.5],
             "batch_index": None}
    header: dict[str, Any] = {"__metadata__": {"mixology_trajectory": json.dumps(notes)}}
    place = 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + 4 * math.prod(shape)]}
        place += 4 * math.prod(shape)
    raw = json.dumps(header).encode()
    with (folders[0] / "endless.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + place)
    refuse("endless.safetensors", "'endless.safetensors' is another kind of file; choose one that Save Traj")
    assert list_names() == []


def test_any_bytes_load_or_are_one_sentence(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    """Bytes changed, cut and added, and shapes, types and notes exchanged."""
    draw = random.Random(5)
    path = folders[1] / saved(trajectory, "any").removesuffix(" [output]")
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:length]
    words = [b'"F32"', b'"BOOL"', b'"I64"', b"[2,4,5,8]", b"[4,2,4,5,8]", b"0", b"null", b"-1", b"1e999", b"NaN", b"[",
             b"9" * 40, b"]", b'\\"', b"\xff", b'"SD15"', b"\\ud800", b'"states"', b'"noise_mask"', b"{", b"}"]
    loaded = 0
    for turn in range(300):
        kind = turn % 4
        if kind == 0:
            content = bytearray(whole)
            for _ in range(draw.choice((1, 5, 50))):
                content[draw.randrange(length if draw.random() < 0.5 else len(whole))] = draw.randrange(256)
        elif kind == 1:
            content = whole[:draw.randrange(len(whole))] + bytes(draw.choice((0, 0, 7)))
        else:
            old = draw.choice([word for word in words if word in header])
            new = header.replace(old, draw.choice(words), draw.choice((1, -1)))
            content = len(new).to_bytes(8, "little") + new + whole[length:]
        path.write_bytes(content)
        list_names()
        fault = find_fault("any_00001_.safetensors [output]")
        try:
            load_trajectory("any_00001_.safetensors [output]")
            loaded += 1
            assert fault is None
        except ValueError as error:
            assert str(error).isprintable() and str(error).startswith("Load Trajectory "), error
    assert 0 < loaded < 150


# ------------------------------------------------------------------------------------------ names

@pytest.mark.parametrize("name", [7, 0.5, True, [], ["a", "b"], {}, {"name": "a"}, b"a.safe", "\ud800", "\u661f"])
def test_a_name_that_is_none_of_the_list(name: Any) -> None:
    words = r"^Load Trajectory finds no trajectory '.*' in the host's folders; choose one of its list"
    for node in (LoadTrajectory, LoadTrajectory.PREPARE_CLASS_CLONE({"hidden_inputs": {}})):
        told = node.validate_inputs(name)
        assert isinstance(told, str) and told.isprintable() and "finds no trajectory" in told
        with pytest.raises(ValueError, match=words):
            node.execute(name)
        with pytest.raises(ValueError, match=words):
            node.fingerprint_inputs(name)


def test_a_connected_name_is_looked_up_when_it_runs(trajectory: Trajectory) -> None:
    assert LoadTrajectory.validate_inputs(None) is True
    assert math.isnan(float(LoadTrajectory.fingerprint_inputs(None)))
    with pytest.raises(ValueError, match="finds no trajectory 'None'"):
        LoadTrajectory.execute(None)
    assert torch.equal(LoadTrajectory.execute(saved(trajectory)).result[0].states, trajectory.states)


def test_headers_are_read_once(trajectory: Trajectory, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
                               ) -> None:
    """Among 200 files, large ones of other kinds; a changed file is looked at again."""
    name = saved(trajectory, "ours")
    header = json.dumps({"weight": {"dtype": "U8", "shape": [10 ** 10], "data_offsets": [0, 10 ** 10]}}).encode()
    for i in range(200):
        with (folders[1] / f"model_{i}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + (10 ** 10 if i % 2 else 10 ** 9))
    opened: list[str] = []
    plain, reader = open, trajectory_file.safe_open

    def count_plain(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return plain(path, *arguments, **options)

    def count_reader(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return reader(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", count_plain)
    monkeypatch.setattr(trajectory_file, "safe_open", count_reader)
    assert list_names() == [name]
    assert 1 <= opened.count("ours_00001_.safetensors") <= 2 and len(set(opened)) == 101
    opened.clear()
    assert list_names() == [name] and opened == []
    os.utime(folders[1] / "model_0.safetensors", ns=(1, 1))
    (folders[1] / "ours_00001_.safetensors").rename(folders[1] / "moved.safetensors")
    assert list_names() == ["moved.safetensors [output]"]
    assert set(opened) == {"model_0.safetensors", "moved.safetensors"}


def test_what_is_no_file_is_not_opened(folders: tuple[Path, Path]) -> None:
    """A pipe would never answer."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes")
    os.mkfifo(folders[0] / "pipe.safetensors")
    (folders[0] / "link.safetensors").symlink_to(folders[0] / "pipe.safetensors")
    assert list_names() == []


def test_an_empty_list_says_what_to_do(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    """As one entry, which can be seen on the node; the list is made anew each time that the interface asks."""
    def offered() -> list[str]:
        return LoadTrajectory.INPUT_TYPES()["required"]["name"][1]["options"]

    assert offered() == [NO_FILE]
    assert str(LoadTrajectory.validate_inputs(NO_FILE)).startswith("Load Trajectory expects a saved trajectory, got ")
    save_trajectory(trajectory, "kept")
    assert offered() == ["kept_00001_.safetensors [output]"]
