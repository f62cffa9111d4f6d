"""The filename_prefix of a node that saves: where in the output folder it leads, with dates filled in."""
from __future__ import annotations

import os
import re
import time
from pathlib import Path

import folder_paths

from ..samplers.wording import legible

LONGEST_PART = 200  # bytes; file systems take 255, and a number and an ending come behind
RESERVED = '<>:"|?*' if os.name == "nt" else ""
DATE = re.compile(r"%date:([^%]*)%")
FIELD = re.compile(r"yyyy|yy|MM?|dd?|hh?|mm?|ss?")
WIDGET = re.compile(r"%([^%.]+\.[^%]+|width|height)%")


def fill_dates(prefix: str, now: time.struct_time) -> str:
    """%date:yyyy-MM-dd hh-mm-ss% as the front end writes it out, which it does for some core nodes only."""
    numbers = {"M": now.tm_mon, "d": now.tm_mday, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}

    def write(field: re.Match[str]) -> str:
        word = field.group()
        if word[0] == "y":
            return f"{now.tm_year:04}"[-len(word):]
        return f"{numbers[word[0]]:0{len(word)}}"

    return DATE.sub(lambda date: FIELD.sub(write, date.group(1)), prefix)


def check_prefix(prefix: str) -> str:
    """The prefix as `folder_paths.get_save_image_path` takes it: below the output folder, its dates filled in.

    Raises:
        ValueError: if it leads out of the output folder, into a hidden one, or makes no file name.
    """
    prefix = fill_dates(prefix, time.localtime())
    check_letters(prefix)
    output = Path(os.path.abspath(folder_paths.get_output_directory()))
    path = Path(os.path.normpath(output / prefix))
    if path != output and not (path.is_relative_to(output) and is_inside(path.parent, output)):
        raise ValueError(
            f"filename_prefix expects a name inside the output folder, got '{legible(prefix)}'; leave out '..' and "
            f"leading slashes.")
    parts = path.relative_to(output).parts
    if not parts or any(part.startswith(".") for part in parts):
        raise ValueError(
            f"filename_prefix expects a name, and no dot before it or a folder of it (what is hidden is never listed), "
            f"got '{legible(prefix)}'; write for instance 'mixology/trajectory'.")
    return "/".join(parts)


def check_letters(prefix: str) -> None:
    """Raises ValueError if a file system, or the host, cannot take the names of a prefix as they are written."""
    found = WIDGET.search(prefix)
    if found:
        raise ValueError(
            f"filename_prefix knows %date:yyyy-MM-dd%, %year%, %month%, %day%, %hour%, %minute% and %second%, got "
            f"'{legible(found.group())}'; write out what it stands for.")
    odd = next((letter for letter in prefix if ord(letter) < 32 or letter in f"\x7f{RESERVED}"
                or "\ud800" <= letter <= "\udfff"), None)
    if odd is not None:
        raise ValueError(
            f"filename_prefix expects letters that a file name can have, got '{legible(odd)}' in "
            f"'{legible(prefix)}'; leave it out.")
    if any(len(os.fsencode(part)) > LONGEST_PART for part in re.split(r"[/\\]", prefix)):
        raise ValueError(
            f"filename_prefix expects names of at most {LONGEST_PART} letters, got '{legible(prefix)}'; shorten it.")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path stays in a folder when its links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False
