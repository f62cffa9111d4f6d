"""Saved trajectories: bit for bit back, only ours in the list, no way out of the folders, one sentence for the rest."""
from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from inversion_rig import invert
from mixology.host import trajectory_file
from mixology.host.trajectory import Trajectory, end_latent, start_trajectory
from mixology.host.trajectory_file import NO_FILE, find_fault, list_names, load_trajectory, save_trajectory
from mixology.nodes.inversion import LoadTrajectory, SaveTrajectory
from safetensors import safe_open
from safetensors.torch import save_file
from trajectory_rig import refuse, saved, spoil, use_folders


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Input and output folders of each test's own."""
    yield from use_folders(tmp_path)


@pytest.fixture(scope="module")
def trajectory(model: Any) -> Trajectory:
    latent = {**tiny.latent(2, 5, 8), "noise_mask": torch.rand(1, 40, 64), "batch_index": [4, 9]}
    return invert(model, latent, 3)


# ------------------------------------------------------------------------------------------ there and back

@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_comes_back_bit_for_bit(models: dict[str, Any], kind: str) -> None:
    latent = {**tiny.latent(2, 5, 8), "noise_mask": torch.rand(1, 40, 64), "batch_index": [4, 9]}
    first = invert(models[kind], latent, 3, "normal")
    again = load_trajectory(saved(first))
    for name in ("sigmas", "states", "end"):
        assert torch.equal(getattr(again, name), getattr(first, name))
        assert getattr(again, name).dtype == getattr(first, name).dtype
    assert (again.levels, again.start, again.latent_format) == (first.levels, first.start, "SD15")
    assert set(again.latent) == set(first.latent) and again.latent["batch_index"] == [4, 9]
    assert all(torch.equal(again.latent[name], first.latent[name]) for name in ("samples", "noise_mask"))
    again.check_model(models[kind])
    one, two = (start_trajectory(t) for t in (first, again))
    assert torch.equal(one[0].generate_noise(one[2]), two[0].generate_noise(two[2])) and torch.equal(one[1], two[1])


def test_half_precision_and_plain_latents_and_video() -> None:
    model, generator = tiny.video(), torch.Generator().manual_seed(3)
    latent = {"samples": torch.randn(1, 16, 2, 6, 4, generator=generator).half()}
    first = invert(model, latent, 2, "simple", prompt=tiny.conditioning(1, 8))
    again = load_trajectory(saved(first))
    assert again.latent["samples"].dtype == torch.float16 and set(again.latent) == {"samples"}
    assert torch.equal(again.states, first.states) and again.latent_format == "Wan21"


def test_files_are_numbered_by_the_host(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    names = [saved(trajectory, prefix) for prefix in ("mixology/trajectory", "mixology/trajectory", "plain")]
    assert names == [f"{name}_.safetensors [output]" for name in (
        "mixology/trajectory_00001", "mixology/trajectory_00002", "plain_00001")]
    assert list_names() == names
    assert {path.name for path in (folders[1] / "mixology").iterdir()} == {
        "trajectory_00001_.safetensors", "trajectory_00002_.safetensors"}


def test_nodes_save_list_and_load(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    assert LoadTrajectory.define_schema().inputs[0].options == [NO_FILE]
    schema = SaveTrajectory.define_schema()
    assert schema.is_output_node and schema.inputs[1].default == "mixology/trajectory"
    result = SaveTrajectory.execute(trajectory, "kept/one")
    name = "kept/one_00001_.safetensors [output]"
    assert result.ui == {"trajectories": [
        {"filename": "one_00001_.safetensors", "subfolder": "kept", "type": "output"}],
        "text": [f"{name}\n3 steps, 2 pictures"]}
    assert LoadTrajectory.define_schema().inputs[0].options == [name]
    assert LoadTrajectory.validate_inputs() is True and LoadTrajectory.validate_inputs(name) is True
    again, latent = LoadTrajectory.execute(name).result
    assert torch.equal(latent["samples"], trajectory.end) and set(latent) == set(end_latent(trajectory))
    before = LoadTrajectory.fingerprint_inputs(name)
    assert before == LoadTrajectory.fingerprint_inputs(name)
    os.utime(folders[1] / "kept" / "one_00001_.safetensors", ns=(1, 1))
    assert LoadTrajectory.fingerprint_inputs(name) != before


def test_list_holds_ours_only(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    source, output = folders
    ours = output / saved(trajectory, "own").removesuffix(" [output]")
    (source / "sub").mkdir()
    (source / "sub" / "mine.safetensors").write_bytes(ours.read_bytes())
    (source / ".hidden").mkdir()
    (source / ".hidden" / "mine.safetensors").write_bytes(ours.read_bytes())
    save_file({"weight": torch.ones(3)}, source / "model.safetensors")
    save_file({"weight": torch.ones(3)}, source / "other.safetensors", {"format": "pt"})
    (source / "cut.safetensors").write_bytes(ours.read_bytes()[:-10])
    (source / "empty.safetensors").touch()
    (source / "mine.txt").write_bytes(ours.read_bytes())
    (source / "folder.safetensors").mkdir()
    assert list_names() == ["sub/mine.safetensors", "own_00001_.safetensors [output]"]


def test_listing_reads_headers_only(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(trajectory)

    class Headers:
        """The reader without its tensors."""

        def __init__(self, *arguments: Any, **options: Any):
            self.file = safe_open(*arguments, **options)

        def __enter__(self) -> Headers:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, attribute: str) -> Any:
            assert attribute in ("keys", "get_slice", "metadata"), attribute
            return getattr(self.file, attribute)

    monkeypatch.setattr(trajectory_file, "safe_open", Headers)
    assert list_names() == [name] and find_fault(name) is None
    with pytest.raises(AssertionError, match="get_tensor"):
        load_trajectory(name)


# ------------------------------------------------------------------------------------------ names

@pytest.mark.parametrize("name", [
    "../secret.safetensors", "../secret.safetensors [output]", "sub/../../secret.safetensors",
    "{root}/secret.safetensors", "{root}/secret.safetensors [output]", "link.safetensors",
    "linked/secret.safetensors", "loop.safetensors",
    "absent.safetensors", "", " [output]", "a\0b.safetensors", "mine.safetensors [temp]", "..\\secret.safetensors",
    "x" * 5000 + ".safetensors", "/dev/zero", "sub",
])
def test_names_cannot_leave_the_folders(trajectory: Trajectory, tmp_path: Path, folders: tuple[Path, Path], name: str,
                                        ) -> None:
    source, output = folders
    ours = output / saved(trajectory, "own").removesuffix(" [output]")
    secret = tmp_path / "secret.safetensors"
    ours.rename(secret)
    (source / "sub").mkdir()
    (source / "link.safetensors").symlink_to(secret)
    (source / "linked").symlink_to(tmp_path, target_is_directory=True)
    (source / "loop.safetensors").symlink_to(source / "loop.safetensors")
    name = name.format(root=tmp_path)
    assert list_names() == []
    with pytest.raises(ValueError, match="finds no trajectory .* in the host's folders; choose one of its list"):
        load_trajectory(name)
    assert "finds no trajectory" in str(LoadTrajectory.validate_inputs(name))


def test_links_inside_the_folder_are_fine(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    name = saved(trajectory, "own")
    (folders[1] / "link.safetensors").symlink_to(folders[1] / name.removesuffix(" [output]"))
    assert torch.equal(load_trajectory("link.safetensors [output]").states, trajectory.states)


@pytest.mark.parametrize("prefix", ["../out", "{root}/out", "a/../../out", "linked/out"])
def test_saving_stays_in_the_output_folder(trajectory: Trajectory, tmp_path: Path, folders: tuple[Path, Path],
                                           prefix: str) -> None:
    (folders[1] / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="a name inside the output folder, got '.*'; leave out '..' and lead"):
        save_trajectory(trajectory, prefix.format(root=tmp_path))
    assert not list(tmp_path.glob("out*safetensors")) and not list(tmp_path.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------ damaged and hostile files

@pytest.mark.parametrize("size", [0, 3, 8, 40, 2000, -1])
def test_truncated(trajectory: Trajectory, folders: tuple[Path, Path], size: int) -> None:
    name = saved(trajectory)
    path = folders[1] / name.removesuffix(" [output]")
    path.write_bytes(path.read_bytes()[:size])
    refuse(name, r"expected a whole safetensors file, but 'trajectory_00001_.safetensors' is damaged \(.*\); save")
    assert list_names() == []


@pytest.mark.parametrize("content", [
    (1 << 62).to_bytes(8, "little") + b"{}", (1 << 21).to_bytes(8, "little") + b"x" * 100,
])
def test_endless_header(folders: tuple[Path, Path], content: bytes) -> None:
    (folders[0] / "big.safetensors").write_bytes(content)
    refuse("big.safetensors", "but 'big.safetensors' is another kind of file; choose one that Save Trajectory wrote")


def test_file_beyond_all_bounds(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(trajectory)
    monkeypatch.setattr(trajectory_file, "LARGEST_FILE", 1000)
    refuse(name, "is another kind of file; choose one that Save Trajectory wrote")
    assert list_names() == []


def test_foreign_files(folders: tuple[Path, Path]) -> None:
    save_file({"weight": torch.ones(3)}, folders[0] / "model.safetensors", {"format": "pt"})
    refuse("model.safetensors", "'model.safetensors' is another kind of file; choose one that Save Trajectory wrote")
    ran = folders[0] / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    (folders[0] / "pickle.safetensors").write_bytes(pickle.dumps(Hostile()))
    refuse("pickle.safetensors", "Load Trajectory expected a (whole safetensors file|trajectory), but 'pickle")
    assert not ran.exists()


def test_another_version(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    name = spoil(trajectory, folders[1], lambda tensors, notes: notes.update(version=2, more=[]))
    refuse(name, "reads files of version 1, but 'spoilt_00001_.safetensors' is of another; update Mixology or save")


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "[" * 50_000, '{"version": 1', '{"version": 1}', "\0"])
def test_notes_that_are_none(trajectory: Trajectory, folders: tuple[Path, Path], text: str) -> None:
    refuse(spoil(trajectory, folders[1], lambda tensors, notes: text), "tensors and notes that belong together, but")


NOTES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "format is no text": lambda t, n: n.update(latent_format=["SD15"]),
    "fewer levels": lambda t, n: n["levels"].pop(),
    "levels are no list": lambda t, n: n.update(levels=7),
    "level of three": lambda t, n: n["levels"][0].append(0.0),
    "level of a whole number": lambda t, n: n.update(start=[1, 10 ** 400]),
    "level not finite": lambda t, n: n.update(start=[1.0, float("inf")]),
    "start is none": lambda t, n: n.update(start=None),
    "index of words": lambda t, n: n.update(batch_index=["a", "b"]),
    "index of another batch": lambda t, n: n.update(batch_index=[1, 2, 3]),
    "one note more": lambda t, n: n.update(extra=1),
    "one tensor more": lambda t, n: t.update(extra=torch.ones(1)),
    "no picture": lambda t, n: t.pop("samples"),
    "states of half floats": lambda t, n: t.update(states=t["states"].half()),
    "sigmas of doubles": lambda t, n: t.update(sigmas=t["sigmas"].double()),
    "picture of bytes": lambda t, n: t.update(samples=t["samples"].to(torch.uint8)),
    "fewer states": lambda t, n: t.update(states=t["states"][1:].clone()),
    "fewer sigmas": lambda t, n: t.update(sigmas=t["sigmas"][1:].clone()),
    "states without pictures": lambda t, n: t.update(states=t["states"][:, :0].clone()),
    "flat states": lambda t, n: t.update(states=t["sigmas"].clone()),
    "another picture": lambda t, n: t.update(samples=t["samples"][:1].clone()),
    "another end": lambda t, n: t.update(end=t["end"][..., 1:].clone()),
    "mask of one number": lambda t, n: t.update(noise_mask=torch.ones(1)),
}


@pytest.mark.parametrize("case", NOTES)
def test_tensors_and_notes_that_do_not_belong_together(trajectory: Trajectory, folders: tuple[Path, Path], case: str,
                                                       ) -> None:
    refuse(spoil(trajectory, folders[1], NOTES[case]), "tensors and notes that belong together, but those of 'spoilt")


@pytest.mark.parametrize(("change", "words"), [
    (lambda t, n: t.update(sigmas=t["sigmas"].flip(0)), "reaches 0 at its end and repeats no sigma"),
    (lambda t, n: t.update(sigmas=t["sigmas"] * float("nan")), "reaches 0 at its end and repeats no sigma"),
    (lambda t, n: t.update(states=t["states"] / 0), "expects finite states"),
    (lambda t, n: t.update(end=t["end"] / 0), "expects finite states"),
    (lambda t, n: n["levels"].__setitem__(-1, [1.0, 0.0]), "samples from noise, got one that starts from a picture"),
])
def test_numbers_that_make_no_trajectory(trajectory: Trajectory, folders: tuple[Path, Path], change: Any, words: str,
                                         ) -> None:
    name = spoil(trajectory, folders[1], change)
    refuse(name, f"Load Trajectory cannot use 'spoilt_00001_.safetensors': .*{words}", at_once=False)


def test_loaded_tensors_do_not_hang_on_the_file(trajectory: Trajectory, folders: tuple[Path, Path]) -> None:
    name = saved(trajectory)
    again, path = load_trajectory(name), folders[1] / name.removesuffix(" [output]")
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(again.states, trajectory.states)
