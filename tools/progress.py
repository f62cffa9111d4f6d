"""One progress bar on stderr; plain lines where stderr is not a terminal."""
from __future__ import annotations

import sys

from tqdm import tqdm

BAR = "{percentage:3.0f}%|{bar:20}| {elapsed}, {remaining} left  {desc}"


class Progress(tqdm):
    """Counts `total` prompts; within one it moves with the host's own progress."""

    def __init__(self, total: int) -> None:
        self.done = 0
        super().__init__(total=max(total, 1), disable=not sys.stderr.isatty(), bar_format=BAR, dynamic_ncols=True)
        self.count = max(total, 1)

    def begin(self, label: str) -> None:
        """Says what runs now."""
        if self.disable:
            sys.stderr.write(f"[{self.done + 1}/{self.count}] {label}\n")
            sys.stderr.flush()
        else:
            self.set_description_str(label)

    def move(self, fraction: float) -> None:
        """How much of the running prompt is done, 0 to 1."""
        self.update(self.done + fraction - self.n)

    def end(self) -> None:
        """The running prompt is over."""
        self.done += 1
        self.move(0.0)
