"""One progress bar on stderr; plain lines where stderr is not a terminal."""
from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType


class Progress:
    """Counts `total` prompts; within one it moves with the host's own progress."""

    def __init__(self, total: int) -> None:
        self.total = max(total, 1)
        self.done = 0
        self._label = ""
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._live:
            sys.stderr.write("\n")

    def begin(self, label: str) -> None:
        """Says what runs now."""
        self._label = label
        if self._live:
            self.move(0.0)
        else:
            sys.stderr.write(f"[{self.done + 1}/{self.total}] {label}\n")
            sys.stderr.flush()

    def move(self, fraction: float) -> None:
        """How much of the running prompt is done, 0 to 1."""
        if not self._live:
            return
        columns = shutil.get_terminal_size((80, 24)).columns
        share = min((self.done + fraction) / self.total, 1.0)
        elapsed = time.monotonic() - self._started
        tail = f" {share:4.0%}  {elapsed:4.0f} s  {self._label}"[:max(columns - 24, 10)]
        width = 20
        filled = round(share * width)
        sys.stderr.write(f"\r\x1b[K{'#' * filled}{'.' * (width - filled)}{tail}")
        sys.stderr.flush()

    def end(self) -> None:
        """The running prompt is over."""
        self.done += 1
        self.move(0.0)
