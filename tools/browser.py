"""Finds a browser for the tests that look at the GUI: one that is installed, Playwright's own, or the system's."""
from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from commands import WORK, Failure, run, say
from environment import Host

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge",
            "microsoft-edge-stable", "msedge")
PLACES = (  # where the makers' installers put them
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    *(f"{os.environ.get(root, '')}/{inside}" for root in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
      for inside in ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")))
FOLDER = WORK / "browsers"
PROGRAM, MISSING = "MIXOLOGY_BROWSER", "MIXOLOGY_NO_BROWSER"  # what the tests are told: a program, or why there is none


def provide(host: Host) -> dict[str, str]:
    """Variables for the tests: where the browser is, or why there is none."""
    found = installed()
    reasons: list[str] = []
    if not found:
        try:
            found = download(host)
        except Failure as failure:
            reasons.append(str(failure))
    if not found:
        try:
            found = from_system()
        except Failure as failure:
            reasons.append(str(failure))
    return {PROGRAM: str(found)} if found else {MISSING: " ".join(reasons)}


def installed() -> Path | None:
    """Chromium, Chrome or Edge where systems keep them."""
    for name in PROGRAMS:
        program = shutil.which(name)
        if program:
            return Path(program)
    return next((Path(place) for place in PLACES if Path(place).is_file()), None)


def download(host: Host) -> Path | None:
    """Playwright's own Chromium, in a folder of the checkout."""
    say("Fetching a browser for the tests of the GUI ...")
    ask = "from playwright.sync_api import sync_playwright as p\nwith p() as w: print(w.chromium.executable_path)"
    paths = os.pathsep.join(filter(None, (str(host.extras or ""), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PLAYWRIGHT_BROWSERS_PATH": str(FOLDER), **({"PYTHONPATH": paths} if paths else {})}
    program = Path(run([host.python, "-c", ask], "Asking Playwright for its browser", env).strip().splitlines()[-1])
    if not program.is_file():
        run([host.python, "-m", "playwright", "install", "chromium"], "Fetching Playwright's browser", env)
    return program if program.is_file() else None


def from_system() -> Path | None:
    """Debian's Chromium, where this process may install packages."""
    if not shutil.which("apt-get") or os.name == "nt" or os.geteuid() != 0:
        raise Failure("Install Chromium, Chrome or Edge for the tests of the GUI.")
    say("Installing the system's Chromium ...")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-qq"], "Reading the system's list of packages", env)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], "Installing Chromium", env)
    return installed()


def complain(left_out: int, variables: dict[str, str]) -> str:
    """The sentence about browser tests that did not run, "" if all did."""
    if not left_out:
        return ""
    why = variables.get(MISSING) or "no browser was found."
    return f"{left_out} browser tests were left out: {why}"


if __name__ == "__main__":
    sys.exit("started by tools/test.py")
