"""Gets Python packages: pip brings uv, uv makes the virtual environments and fills them."""
from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

from commands import WORK, Failure, run, say

UV = "uv==0.13.9"
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # the newest set that imports together
PAGE = ("matplotlib==3.10.9",)  # what the gallery needs beside the host's own packages
DEV = (*PAGE, "pytest==9.2.0", "pytest-xdist==3.8.0", "ruff==0.17.6", "basedpyright==1.40.2", "diffusers==0.42.1",
       "playwright==1.65.2")


def require_pip() -> None:
    """Gives this Python a pip if it has none and can make one."""
    if _quiet([sys.executable, "-m", "pip", "--version"]) is None:
        _quiet([sys.executable, "-m", "ensurepip", "--user"])
        if _quiet([sys.executable, "-m", "pip", "--version"]) is None:
            raise Failure(f"{sys.executable} has no pip and cannot make one: install pip for it "
                          "(on Debian and Ubuntu: apt-get install python3-pip) and start again.")


def uv() -> Path:
    """The pinned uv, in a folder of its own: needs no venv module and leaves the system's Python alone."""
    home = WORK / UV.replace("==", "-")
    program = home / "bin" / ("uv.exe" if os.name == "nt" else "uv")
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        require_pip()
        run([sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--target", home, UV],
            "Fetching the installer uv", pip_environment())
        if not program.exists():
            raise Failure("Fetching the installer uv failed: its package holds no program for this system.")
        (home / "complete").touch()
    return program


def pip_environment() -> dict[str, str]:
    """This process's environment without the settings that forbid pip a folder of its own."""
    return {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}


def uv_environment() -> dict[str, str]:
    """This process's environment, with pip's index settings in uv's own words (uv does not read them)."""
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    listed = _quiet([sys.executable, "-m", "pip", "config", "list"]) or ""
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if separator and section in ("global", "install", ":env:"):
            found[name] = " ".join(str(ast.literal_eval(value)).split())
    for name, variable in (("index-url", "UV_DEFAULT_INDEX"), ("extra-index-url", "UV_INDEX"),
                           ("find-links", "UV_FIND_LINKS"), ("trusted-host", "UV_INSECURE_HOST"),
                           ("cert", "SSL_CERT_FILE")):
        if name in found:
            value = found[name].replace(" ", ",") if name == "find-links" else found[name]
            env.setdefault(variable, value)
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip does with several indexes
    env.setdefault("UV_HTTP_TIMEOUT", "180")
    return env


def make_venv(folder: Path) -> Path:
    """An empty virtual environment in `folder` (what stood there goes); returns its Python."""
    run([uv(), "venv", "--quiet", "--clear", "--no-python-downloads", "--seed", "--python", sys.executable, folder],
        "Making a virtual environment", uv_environment())
    return venv_python(folder)


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(python: Path, what: str, *arguments: str | Path) -> None:
    say(f"Installing {what} ...")
    run([uv(), "pip", "install", "--quiet", "--python", python, *arguments], f"Installing {what}", uv_environment())


def fetch_sdist(name: str, version: str, sha256: str) -> Path:
    """The source archive of a package, from the package index or from an earlier start."""
    folder = WORK / "downloads"
    archive = folder / f"{name.replace('-', '_')}-{version}.tar.gz"
    if not (archive.exists() and _digest(archive) == sha256):
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / f"{archive.name}.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        require_pip()
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--no-binary=:all:",
             "--ignore-requires-python", "--require-hashes", "--dest", folder, "-r", wanted],
            f"Fetching {name} {version}", pip_environment())
        if not archive.exists() or _digest(archive) != sha256:
            raise Failure(f"Fetching {name} {version} failed: the file is not the pinned one ({sha256[:12]}...).")
    return archive


def unpack(archive: Path, inside: str, target: Path) -> None:
    """Unpacks one folder of an archive to `target`, all or nothing; links and outside paths are refused."""
    fresh = target.with_name(target.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            prefix = PurePosixPath(inside).parts
            if parts[1:1 + len(prefix)] != prefix or not member.isfile():
                continue
            path = fresh.joinpath(*parts[1 + len(prefix):])
            if ".." in parts or not path.resolve().is_relative_to(fresh.resolve()):
                raise Failure(f"{archive.name} holds a path that leads outside: {member.name}.")
            source = tar.extractfile(member)
            if source is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _quiet(command: list[str]) -> str | None:
    """The program's output, or None if it failed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
