"""The pictures of the drawn world: five icon sets from the npm registry, drawn at 128 x 128.

    python demo/train_sets.py --work FOLDER

Needs npm, pillow, numpy and resvg-py 0.5.0. The sets are packed into FOLDER/sets, held against their integrity, and
written to FOLDER/sets.safetensors: premultiplied RGBA in bytes [style, thing, 4, 128, 128] and the silhouettes
[style, thing, 128, 128]. Half a minute on one core; nothing else of the training needs the network.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import drawings
import numpy as np
import torch
from safetensors.torch import save_file

SIDE = 128
RASTER = "0.5.0"  # the version of resvg-py that the shipped weights learned from
SETS = {  # version and integrity
    "noto": ("1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    "fluent-emoji-flat": (
        "1.2.6", "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    "twemoji": ("1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    "fluent-emoji": (
        "1.2.7", "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="),
    "fluent-emoji-high-contrast": (
        "1.2.6", "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w=="),
}


def fetch_set(name: str, folder: Path) -> dict[str, Any]:
    """The icons of a set, from FOLDER or from the registry.

    Raises:
        ValueError: if the package is another than the pinned one.
    """
    version, integrity = SETS[name]
    path = folder / f"iconify-json-{name}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"], cwd=folder, check=True)
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != integrity:
        raise ValueError(f"Expected {path.name} with sha512-{integrity}, got sha512-{found}; remove the file.")
    with tarfile.open(path) as archive:
        icons = archive.extractfile("package/icons.json")
        return {} if icons is None else json.load(icons)


def draw_icon(icons: dict[str, Any], name: str) -> np.ndarray:
    """RGBA in bytes [SIDE, SIDE, 4]."""
    import resvg_py
    from PIL import Image

    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, usual)) for key, usual in
           (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(map(str, box))}" width="{SIDE}" '
           f'height="{SIDE}" color="#222">{icon["body"]}</svg>')
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((SIDE, SIDE)))


def fill_holes(alpha: torch.Tensor) -> torch.Tensor:
    """What the outside of silhouettes [N, H, W] in bytes, spreading from the border, does not reach: boolean."""
    free = torch.nn.functional.pad((alpha < 96).float()[:, None], (1, 1, 1, 1), value=1.0)
    reached = torch.zeros_like(free)
    reached[..., 0, :] = 1
    while True:
        wider = torch.nn.functional.max_pool2d(reached, 3, 1, 1) * free
        if torch.equal(wider, reached):
            return (1 - reached)[:, 0, 1:-1, 1:-1] > 0
        reached = wider


def find_silhouettes(alpha: torch.Tensor) -> torch.Tensor:
    """Silhouettes [style, thing, H, W] in 0 and 1, from opacities in bytes.

    Lines are filled: as the flat drawing is where it is the same one, which keeps real holes and closes open lines.
    """
    whole = alpha >= 96
    styles = list(drawings.STYLES)
    line, flat = styles.index("line"), whole[styles.index("flat")]
    filled = fill_holes(alpha[line])
    common, both = (filled & flat).sum(dim=(1, 2)), (filled | flat).sum(dim=(1, 2))
    same = (common / both > 0.8)[:, None, None]
    whole[line] |= torch.where(same, flat, filled)
    return whole.byte()


def make_sets(work: Path) -> None:
    target = work / "sets.safetensors"
    if target.exists():
        return
    sets = {name: fetch_set(name, work / "sets") for name in SETS}
    rgba = torch.from_numpy(np.stack([
        np.stack([draw_icon(sets[source], icon) for icon in drawings.ICONS.values()])
        for source in drawings.STYLES.values()])).movedim(-1, 2)
    alpha = rgba[:, :, 3:]
    colour = (rgba[:, :, :3].float() * alpha.float() / 255).round().byte()
    save_file({"rgba": torch.cat([colour, alpha], 2).contiguous(), "silhouettes": find_silhouettes(alpha[:, :, 0])},
              target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"sets: {len(drawings.THINGS)} things in {len(drawings.STYLES)} styles, sha256 {digest}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the icon sets.")
    parser.add_argument("--work", type=Path, required=True)
    make_sets(parser.parse_args().work)
