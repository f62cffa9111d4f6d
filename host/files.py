"""Files that a node lists: what keeps one from loading, and when to load it again."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def tell_fault(load: Callable[[], Any]) -> str | None:
    """What keeps something from loading, in the one sentence that `load` raises; None if nothing does."""
    try:
        load()
    except ValueError as error:
        return str(error)
    return None


def fingerprint_files(name: object, find: Callable[[], Iterable[Path]]) -> str | float:
    """Changes when a file behind `name` changes, so that the host loads it again; for a name that is connected, which
    the host does not know yet, always, and where a file is missing: loading will say so.

    Raises:
        ValueError: if `find` finds no file of that name.
    """
    if name is None:
        return math.nan
    paths = list(find())
    try:
        files = [path.stat() for path in paths]
    except OSError:
        return math.nan
    return " ".join(f"{file.st_mtime_ns}.{file.st_size}" for file in files)
