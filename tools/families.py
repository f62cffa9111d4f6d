"""Prints what works on which model family, and writes docs/families.md: python3 tools/families.py"""
from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import environment
from commands import ROOT, guarded, say

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    if "MIXOLOGY_HOST" not in os.environ:
        return environment.prepare(dev=True).start("script", Path(__file__).resolve(), [], ONE_THREAD)
    return write(environment.current().version)


def write(version: str) -> int:
    """In the host's Python: the page, and 1 if something neither works nor is refused."""
    sys.path.insert(0, str(ROOT / "tests"))  # before this folder, which has a file of the same name as well
    import conftest  # noqa: F401  (it makes the host and the pack importable)
    import families_matrix as matrix
    import torch

    started, rows = time.monotonic(), {}
    with torch.inference_mode():
        for name, family in matrix.ALL.items():
            if family.is_missing():
                say(f"{name}: this ComfyUI has no {family.kind}")
                continue
            say(f"{name} ...")
            rows[name] = matrix.judge_all(name)
    page = matrix.render(rows, version)
    print(page)  # noqa: T201
    matrix.PAGE.parent.mkdir(exist_ok=True)
    matrix.PAGE.write_text(page, encoding="utf-8")
    failed = [name for name, (_, cells) in rows.items() if any(cell.kind == "fails" for cell in cells.values())]
    say(f"{len(rows)} families in {time.monotonic() - started:.0f} seconds; "
        f"{'failed on ' + ', '.join(failed) if failed else 'every technique works or says why not'}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
