"""The gallery's page, and what it does after it was cut off."""
from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gallery
import kept_runs
import pytest
import stage
from comfyui import Run
from kept_runs import KeptRuns
from PIL import Image
from progress import Progress


def test_the_judge_reads_picture_files() -> None:
    scene = stage.pure_room("demo.world").parse_caption("a plain red circle on a white background")
    image = stage.pure_room("demo.world").draw_scene(scene, 1)[0]
    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().numpy()).save(file, "PNG")
    pictures = stage.read_pictures([file.getvalue()] * 2)
    assert pictures.shape == (2, 128, 128, 3) and (pictures[0] - image).abs().max() < 0.01
    assert stage.pure_room("demo.judge").judge_pictures(pictures).names("shape") == ["circle", "circle"]


def test_the_gallery_needs_no_other_file(tmp_path: Path) -> None:
    plot = gallery.Plot("Trade", "nu", "share", [gallery.Curve("layout", [(0, 0.9), (1, 0.2)], [0.1, 0.1])])
    section = gallery.Section("A <b> title", "Text", {"nu": "0.5"}, [gallery.Strip([gallery.Picture(b"\x89PNG", "x")])],
                              [plot], [gallery.Table(["a", "b"], [["1", "2"]])])
    gallery.write_page(tmp_path / "new" / "index.html", "Gallery", "All of it", [section])
    page = (tmp_path / "new" / "index.html").read_text(encoding="utf-8")
    assert "A &lt;b&gt; title" in page and "data:image/png;base64," in page and "prefers-color-scheme: dark" in page
    chart = page[page.index("<svg"):page.index("</svg>")]
    assert all(f">{words}<" in chart for words in ("Trade", "nu", "share", "layout")) and "nan" not in chart.lower()
    assert "http" not in page and "src=\"data:" in page


def test_a_gallery_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Any] = []

    def post(prompt: Any, on_event: Any) -> Run:
        posted.append(prompt)
        return Run("id", images={"3": [b"\x89PNG\x00"]}, outputs={"3": {"images": []}})

    def start(state: str) -> stage.Stage:
        server: Any = SimpleNamespace(post=post)
        return stage.Stage(server, {}, Progress(2), KeptRuns(tmp_path, state))

    sampled: Any = SimpleNamespace(prompt={"1": {"class_type": "Sampler", "inputs": {"seed": 3}}})
    other: Any = SimpleNamespace(prompt={"1": {"class_type": "Sampler", "inputs": {"seed": 4}}})
    first = start("0.30.0").run(sampled, "first")
    again = start("0.30.0")
    assert len(again.kept) == 1 and again.run(sampled, "again") == first and len(posted) == 1
    next(again.kept.folder.glob("*.json")).write_text("{", encoding="utf-8")
    assert again.run(sampled, "a torn file is run again") == first and len(posted) == 2
    again.run(other, "another seed")
    assert len(posted) == 3
    elsewhere = start("0.31.0")
    assert len(elsewhere.kept) == 0 and [path.name for path in tmp_path.iterdir()] == [elsewhere.kept.folder.name]
    touched = tmp_path / "shipped.py"
    touched.write_text("1", encoding="utf-8")
    monkeypatch.setattr(kept_runs, "ROOT", tmp_path)
    monkeypatch.setattr(kept_runs, "SHIPPED", ("shipped.py",))
    changed = KeptRuns(tmp_path / "runs", "0.31.0").folder
    touched.write_text("12", encoding="utf-8")
    assert KeptRuns(tmp_path / "runs", "0.31.0").folder != changed, "another pack, other results"


def test_an_interrupted_run_is_not_kept(tmp_path: Path) -> None:
    kept = KeptRuns(tmp_path, "")
    kept.keep({}, Run("id", status="interrupted"))
    assert kept.find({}) is None and len(kept) == 0
