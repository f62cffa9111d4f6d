"""Every benchmark runs from beginning to end; what it finds is not judged here."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHES = sorted(path.name for path in (Path(__file__).resolve().parent.parent / "bench").glob("*.py")
                 if path.name not in {"timing.py", "watch.py", "contenders.py", "peers.py", "compare.py"})


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_runs(name: str, root: Path) -> None:
    assert "ms" in run_bench(root / "bench" / name)


@pytest.mark.slow
def test_the_comparison_runs_and_writes_its_page(root: Path, tmp_path: Path) -> None:
    """Rows are what the methods say they are: a comparison of something else would have others."""
    page = tmp_path / "page.md"
    run_bench(root / "bench" / "compare.py", "--side", "8", "--page", str(page), "--no-growth")
    rows = {cells[1].strip(): cells[5].strip() for line in page.read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and len(cells := line.split("|")) == 8}
    told = {"core: bare KSampler": 2, "diffusers: bare DDIM loop": 2, "core: masked conditioning": 3,
            "own lines: attention couple": 2, "diffusers: CycleDiffusionPipeline": 4,
            "diffusers: DDIMInverseScheduler": 1, "diffusers + own lines: MagicFusion's rule": 4}
    assert {name: float(rows[name]) for name in told} == told
    written = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    for text in (page.read_text(encoding="utf-8"), written):
        assert [line for line in text.splitlines() if line.startswith("### ")] == [
            "### MagicMix", "### Token Attention Scale", "### Cross-Attention Merge, two styles",
            "### Epsilon Merge, two styles", "### Cycle Sampler", "### DDIM Inversion",
            "### Feature Injection, at every step", "### Saliency Fusion, two checkpoints",
            "### Saliency Fusion, two LoRA stacks on one checkpoint", "### Image Mixer, five tokens"]


def test_growth_states_the_exponent_of_a_power(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "bench"))
    import compare

    growth = {"batch": {"bare": [3.0 * value for value in compare.GROWTH["batch"]],
                        "squared": [0.5 * value ** 2 for value in compare.GROWTH["batch"]]}}
    lines = compare.list_growth(growth).splitlines()[2:]
    assert lines == ["| batch: 1, 2, 4 | bare | 3.0, 6.0, 12.0 | 1.00 |",
                     "| batch: 1, 2, 4 | squared | 0.5, 2.0, 8.0 | 2.00 |"]
    compare.draw_growth(growth, tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text(encoding="utf-8")
    assert "bare: 1.00" in drawn and "squared: 2.00" in drawn


def test_watching_counts_rows_and_what_is_alive_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "bench"))
    import watch

    network, x = torch.nn.Linear(250, 250).requires_grad_(False), torch.ones(3, 250)

    def run() -> int:
        for _ in range(2):  # each turn frees what the one before made
            network(torch.cat((x, x)))
        return 2

    with torch.inference_mode():
        rows, peak = watch.watch(run, [network])
    assert rows == 6 and peak == pytest.approx(2 * 6 * 250 * 4 / 1e6)
    assert not network._forward_pre_hooks


def run_bench(script: Path, *more: str) -> str:
    command = [sys.executable, "-s", str(script), "--rounds", "1", "--steps", "2", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
