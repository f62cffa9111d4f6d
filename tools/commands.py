"""Runs other programs for the tools: logs what they say and turns their failures into one plain sentence."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".mixology"
LOGS = WORK / "logs"
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "tests", "tools", "bench")

CAUSES: tuple[tuple[str, str], ...] = (
    (r"No space left on device|ENOSPC|os error 28|not enough space on the disk",
     "the disk is full: free about 8 GB and start again (what was fetched is kept)"),
    (r"Temporary failure in name resolution|dns error|Name or service not known|getaddrinfo|nodename nor servname"
     r"|Network is unreachable|Connection refused|Connection reset|error sending request|Failed to fetch"
     r"|Failed to establish a new connection|Read timed out|operation timed out|tcp connect error|ProxyError",
     "the package index could not be reached: check the network and start again (what was fetched is kept)"),
    (r"CERTIFICATE_VERIFY_FAILED|invalid peer certificate|certificate verify failed",
     "the package index's certificate was not accepted: point SSL_CERT_FILE at your network's certificates"),
    (r"DO NOT MATCH THE HASHES", "the package index served another file than the pinned one"),
    (r"Permission denied|os error 13|Access is denied|Read-only file system",
     f"a folder cannot be written: check the permissions of {WORK} and of your cache folder"),
    (r"No matching distribution found|No solution found|has no wheels|was not found in the package registry",
     f"the package index has no fitting version for Python {sys.version_info[0]}.{sys.version_info[1]} on this system"),
)


class Failure(Exception):
    """What went wrong, as one sentence for the person who started the tool."""


def say(text: str) -> None:
    """Writes one line about what happens now; stdout stays free for results."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def guarded(main: Callable[[], int]) -> int:
    """Runs a tool: a Failure becomes one sentence, Ctrl-C and SIGTERM end it tidily."""
    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        return main()
    except Failure as failure:
        say(f"Mixology: {failure}")
        return 1
    except KeyboardInterrupt:
        say("Mixology: stopped.")
        return 130
    except OSError as error:
        if error.errno in (28, 122):
            say("Mixology: the disk is full: free some space and start again.")
            return 1
        raise


def diagnose(output: str) -> str:
    """The cause behind a failed program's output, in a few words."""
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)  # colours
    for pattern, cause in CAUSES:
        if re.search(pattern, output, re.IGNORECASE):
            return cause
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|failed|cannot|no module", line, re.IGNORECASE)]
    return (telling or lines or ["it said nothing"])[-1][:300].rstrip(".")


def run(command: Sequence[str | Path], purpose: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Runs a program to its end and returns its output; `purpose` begins the sentence if it fails."""
    LOGS.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", check=False)
    except OSError as error:
        raise Failure(f"{purpose} failed: {words[0]} cannot be started ({error.strerror}).") from error
    with (LOGS / "setup.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(words)}\n{done.stdout}\n")
    if done.returncode:
        raise Failure(f"{purpose} failed: {diagnose(done.stdout)}. (Log: {LOGS / 'setup.log'})")
    return done.stdout


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Holds the set-up lock, so that two tools started together do not write over each other."""
    WORK.mkdir(exist_ok=True)
    with (WORK / "lock").open("a+") as handle:
        told = False
        while not _try_lock(handle.fileno()):
            if not told:
                say("Waiting for another Mixology set-up to finish ...")
                told = True
            time.sleep(0.5)
        yield  # closing the file gives the lock back, also when this process dies


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def link_folder(target: Path, link: Path) -> None:
    """Makes `link` (inside WORK) lead to `target`; a fresh copy where links are impossible."""
    if WORK not in link.parents:
        raise ValueError(f"expected a link inside {WORK}, got {link}")
    if os.path.realpath(link) == os.path.realpath(target):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    _remove(link)
    try:
        link.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):
        try:
            import _winapi
            _winapi.CreateJunction(str(target), str(link))
        except (ImportError, OSError, AttributeError):
            _remove(link)
            shutil.copytree(target, link, ignore=NOT_COPIED)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists() or os.path.lexists(path):
        try:
            path.rmdir()  # a junction, or an empty folder
        except OSError:
            shutil.rmtree(path)
