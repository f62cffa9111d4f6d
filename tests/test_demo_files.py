"""Files of demo checkpoints: what core's savers write reads back bit for bit, the rest is refused in a sentence."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import CheckpointSave, ModelSave
from mixology.host import demo
from mixology.nodes.demo import DemoCheckpoint
from safetensors.torch import load_file, save_file

UNET_KEY = "diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
TEXT_KEY = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"

SHIPPED = ["shapes", "sketch", "scenes", "hearts", "mixer"]

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Any) -> tuple[Any, Any, Any]:
    return checkpoints("shapes")


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An output folder whose subfolders the host lists, as its main.py arranges."""
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    for folder in demo.SAVE_FOLDERS:
        (tmp_path / folder).mkdir()
        listed = ([str(tmp_path / folder)], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, listed)
        folder_paths.filename_list_cache.pop(folder, None)
    yield tmp_path
    folder_paths.set_output_directory(before)
    for folder in demo.SAVE_FOLDERS:
        folder_paths.filename_list_cache.pop(folder, None)


def test_the_demo_folder_is_small() -> None:
    """Together at most 80 MB; the CLIP and what is taught from the first checkpoint at most 10 MB each."""
    assert sum(path.stat().st_size for path in demo.DEMO.rglob("*") if path.is_file()) <= 80e6
    assert all(demo.shipped_file(name).stat().st_size <= 10e6 for name in ("clip", *SHIPPED[1:]))


def weights(patcher: Any) -> State:
    return {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)


def change(patcher: Any, key: str) -> Any:
    """A clone with noise patched onto one weight."""
    shape = patcher.model.state_dict()[key].shape
    patched = patcher.clone()
    patched.add_patches({key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(0)),))}, 0.3)
    return patched


@pytest.mark.seam
def test_model_save_reads_back_bit_for_bit(checkpoint: tuple[Any, Any, Any], output: Path) -> None:
    model, clip, vae = checkpoint
    patched = change(model, UNET_KEY)
    ModelSave().save(patched, "diffusion_models/sub/mine")
    name = f"[diffusion_models] {Path('sub') / 'mine_00001_.safetensors'}"
    assert demo.list_names() == [*SHIPPED, name]
    loaded = demo.load_checkpoint(name)
    comfy.model_management.load_models_gpu([patched])
    assert equal(weights(loaded[0]), weights(patched))
    patched.detach()
    assert not equal(weights(loaded[0]), weights(model))
    assert equal(weights(loaded[1].patcher), weights(clip.patcher))
    assert equal(weights(loaded[2].patcher), weights(vae.patcher))


@pytest.mark.seam
def test_checkpoint_save_reads_back_bit_for_bit(checkpoint: tuple[Any, Any, Any], output: Path) -> None:
    model, clip, _ = checkpoint
    patched, patched_clip = change(model, UNET_KEY), clip.clone()
    patched_clip.patcher = change(clip.patcher, TEXT_KEY)
    other = demo.load_vae(demo.shipped_file("vae"))
    with torch.no_grad():
        other.first_stage_model.taesd_decoder[1].weight.mul_(1.01)
    CheckpointSave().save(patched, patched_clip, other, "checkpoints/all")
    name = "[checkpoints] all_00001_.safetensors"
    assert demo.list_names() == [*SHIPPED, name]
    loaded = demo.load_checkpoint(name)
    comfy.model_management.load_models_gpu([patched, patched_clip.patcher])
    assert equal(weights(loaded[0]), weights(patched))
    assert equal(weights(loaded[1].patcher), weights(patched_clip.patcher))
    assert equal(weights(loaded[2].patcher), weights(other.patcher))
    patched.detach()
    patched_clip.patcher.detach()
    assert not equal(weights(loaded[1].patcher), weights(clip.patcher))


def write_damaged(folder: Path) -> list[str]:
    """Files that no loader should open, by what is wrong with each."""
    whole = demo.shipped_file("shapes").read_bytes()
    bad = {
        "empty": b"",
        "short": whole[:5],
        "cut": whole[:-100],
        "header": whole[:8] + b"[" * 1000 + whole[1008:],
        "length": (1 << 62).to_bytes(8, "little") + whole[8:2000],
        "text": b"not a model at all",
    }
    for name, content in bad.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return list(bad)


@pytest.mark.parametrize("name", ["empty", "short", "cut", "header", "length", "text"])
def test_damaged_file_is_not_listed_and_says_so(output: Path, name: str) -> None:
    assert name in write_damaged(output / "checkpoints")
    assert demo.list_names() == SHIPPED
    expected = rf"expected a whole safetensors file, but '{name}\.safetensors' is damaged"
    with pytest.raises(ValueError, match=expected):
        demo.load_checkpoint(f"[checkpoints] {name}.safetensors")
    assert "is damaged" in str(DemoCheckpoint.validate_inputs(f"[checkpoints] {name}.safetensors"))


def test_other_models_are_not_listed_and_say_so(output: Path) -> None:
    state = load_file(demo.shipped_file("shapes"))
    key = "model.diffusion_model.out.2.weight"
    folder = output / "checkpoints"
    save_file({**state, key: state[key][:3].contiguous()}, folder / "three.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "lora.safetensors")
    vae = load_file(demo.shipped_file("vae"))
    vae.pop("first_stage_model.vae_shift")
    save_file({**state, **vae}, folder / "vae.safetensors")
    (folder / "old.ckpt").write_bytes(b"anything")
    assert demo.list_names() == SHIPPED
    with pytest.raises(ValueError, match="sizes of the demo model, but 'three.safetensors' holds another one"):
        demo.load_checkpoint("[checkpoints] three.safetensors")
    with pytest.raises(ValueError, match="sizes of the demo model, but 'lora.safetensors' holds none"):
        demo.load_checkpoint("[checkpoints] lora.safetensors")
    with pytest.raises(ValueError, match="sizes of the demo VAE, but 'vae.safetensors' holds another one"):
        demo.load_checkpoint("[checkpoints] vae.safetensors")


def test_large_files_are_never_opened(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = output / "checkpoints" / "copy.safetensors"
    file.write_bytes(demo.shipped_file("shapes").read_bytes())
    assert demo.list_names() == [*SHIPPED, "[checkpoints] copy.safetensors"]
    monkeypatch.setattr(demo, "LARGEST_FILE", file.stat().st_size - 1)
    monkeypatch.setattr(demo, "check_shapes", lambda path: pytest.fail(f"opened {path}"))
    assert demo.list_names() == SHIPPED


@pytest.mark.parametrize("name", [
    "[checkpoints] ../secret.safetensors", "[checkpoints] /secret.safetensors", "[output] secret.safetensors",
    "../secret", "secret.safetensors", "[checkpoints] gone.safetensors", "", "[checkpoints] "])
def test_no_name_leads_out_of_the_folders(output: Path, name: str) -> None:
    (output / "secret.safetensors").write_bytes(demo.shipped_file("shapes").read_bytes())
    with pytest.raises(ValueError, match="Demo Checkpoint finds no"):
        demo.load_checkpoint(name)


def test_missing_shipped_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(demo.read_config()), encoding="utf-8")
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    with pytest.raises(ValueError, match=r"expected the file 'shapes\.safetensors', got none"):
        demo.load_checkpoint("shapes")


def test_fingerprint_follows_the_file(output: Path) -> None:
    file = output / "checkpoints" / "copy.safetensors"
    file.write_bytes(demo.shipped_file("shapes").read_bytes())
    name = "[checkpoints] copy.safetensors"
    first = DemoCheckpoint.fingerprint_inputs(name)
    assert DemoCheckpoint.fingerprint_inputs(name) == first
    state = load_file(file)
    save_file(state, file, metadata={"changed": "yes"})
    assert DemoCheckpoint.fingerprint_inputs(name) != first
