"""What the Comfy registry gets of a checkout: what git knows, without what `.comfyignore` names."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ask_git(command: str, *arguments: str) -> list[str]:
    made = subprocess.run(["git", command, "-z", *arguments], cwd=ROOT, capture_output=True, check=True)
    return [part for part in made.stdout.decode("utf-8").split("\0") if part]


def is_checkout() -> bool:
    """A downloaded folder of sources holds no list of its files."""
    return (ROOT / ".git").exists() and shutil.which("git") is not None


def list_files() -> list[str]:
    """The archive's files as `comfy node pack` takes them; git itself reads the patterns."""
    left_out = set(ask_git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [name for name in ask_git("ls-files") if name not in left_out and (ROOT / name).exists()]


def unpack(folder: Path) -> Path:
    """The archive's files, and no others, in `folder`."""
    for name in list_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder
