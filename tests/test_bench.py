"""Every benchmark runs from beginning to end; what it finds is not judged here."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = sorted(path.name for path in (Path(__file__).resolve().parent.parent / "bench").glob("*.py")
                 if path.name != "timing.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_runs(name: str, root: Path) -> None:
    command = [sys.executable, "-s", str(root / "bench" / name), "--rounds", "1", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=dict(os.environ))
    assert done.returncode == 0 and "ms" in done.stdout, done.stderr[-2000:]
