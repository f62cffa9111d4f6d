"""Passes the tests, set-up included: python3 tools/test.py [--quick] [-- arguments for pytest]

ruff, the type checker, all tests on the main ComfyUI, then the seam tests on the oldest supported one, in two workers
of one thread each. --quick leaves out the measurements of meaning, the slow and the wide tests and the oldest host.
COMFYUI_PATH tests on that install.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import browser
import environment
from commands import WORK, guarded, say

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # several torch processes would slow each other down


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no meaning, no slow tests, no server, only the main host")
    parser.add_argument("--only", choices=("lint", "main", "oldest"), help="one part of it")
    parser.add_argument("--workers", type=int, default=None, metavar="N",
                        help="test processes: 2, or 1 with arguments for pytest")
    parser.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="after --: passed on to pytest")
    options = parser.parse_args()
    started = time.monotonic()
    trouble: list[str] = []
    blind = ""
    counts: Counter[str] = Counter()
    spread = spread_tests(options.workers or (1 if options.pytest else 2))
    host = environment.prepare(dev=True)
    if options.only in (None, "lint"):
        trouble += lint(host)
    if options.only in (None, "main"):
        marks = ["-m", "not meaning and not slow and not wide"] if options.quick else []
        seen = {} if options.quick else browser.provide(host)
        trouble += run_tests(host, "main", [*spread, *marks, *options.pytest], counts, seen)
        blind = browser.complain(count_blind(WORK / "reports" / "main.xml"), seen)
    if options.only == "oldest" or (options.only is None and not options.quick and not os.environ.get("COMFYUI_PATH")):
        oldest = environment.prepare(environment.OLDEST, dev=True)
        marks = ["-m", "seam and not meaning and not slow"]
        trouble += run_tests(oldest, "oldest", [*spread, *marks, *options.pytest], counts)
    if blind and os.environ.get("CI") == "true":
        trouble.append("the browser")
    say(f"\nMixology: {'failed: ' + ', '.join(trouble) if trouble else 'all passed'} "
        f"in {time.monotonic() - started:.0f} seconds.")
    if blind:
        say(blind)
    if counts:
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        print(f"total: {passed} passed, {failed} failed, {counts['skipped']} skipped", flush=True)  # noqa: T201
    return 1 if trouble else 0


def spread_tests(workers: int) -> list[str]:
    """pytest's arguments for several workers: each takes a file at a time, in the order of `tests/conftest.py`."""
    return ["-n", str(workers), "--dist=loadfile", "--no-loadscope-reorder"] if workers > 1 else []


def lint(host: environment.Host) -> list[str]:
    """ruff and basedpyright; returns the names of what failed."""
    checks = {"ruff": ["check", "--quiet"], "basedpyright": ["--pythonpath", str(host.python)]}
    trouble = []
    for name, arguments in checks.items():
        say(f"{name} ...")
        if host.start("module", name, arguments):
            trouble.append(name)
    return trouble


def run_tests(host: environment.Host, name: str, arguments: Sequence[str], counts: Counter[str],
              variables: Mapping[str, str] | None = None) -> list[str]:
    """pytest on one host; adds up its counts and returns what failed."""
    say(f"\npytest on ComfyUI {host.version} ...")
    report = WORK / "reports" / f"{name}.xml"
    report.unlink(missing_ok=True)
    status = host.start("module", "pytest", [f"--junitxml={report}", "--durations=10", *arguments],
                        {**ONE_THREAD, **(variables or {})})
    counts.update(read_counts(report))
    return [] if status == 0 else [f"pytest on ComfyUI {host.version}"]


def count_blind(report: Path) -> int:
    """The tests of a junit report that had no browser."""
    skipped = ElementTree.parse(report).getroot().iter("skipped") if report.exists() else ()
    return sum("no browser:" in entry.get("message", "") for entry in skipped)


def read_counts(report: Path) -> Counter[str]:
    """tests, failures, errors and skipped of a junit report; nothing if there is none."""
    counts: Counter[str] = Counter()
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            counts.update({key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")})
    return counts


if __name__ == "__main__":
    sys.exit(guarded(main))
