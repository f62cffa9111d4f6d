"""What the processes of `compare.py` share: seconds a step, and one watched run for its model rows and its memory."""
from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], int]  # samples, and returns how many steps that took


def step_seconds(run: Run, whole: bool = False) -> float:
    """Seconds a step, or of the whole run: of the processor on a CPU, which others use too; by the clock on a GPU."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    started = clock()
    steps = run()
    if gpu:
        torch.cuda.synchronize()
    return (clock() - started) / (1 if whole else steps)


def watch(run: Run, networks: Iterable[torch.nn.Module]) -> tuple[float, float]:
    """Model rows a step, and the most MB of tensors that were alive beside those from before the run."""
    rows: list[int] = []

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        rows.append(len(inputs[0]))

    hooks = [network.register_forward_pre_hook(count) for network in networks]
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps = run()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with Alive() as alive:
                steps = run()
            peak = alive.most
    finally:
        for hook in hooks:
            hook.remove()
    return sum(rows) / steps, peak / 1e6


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and nothing has freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def _meet(self, value: Any, fresh: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if fresh else 0
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self._part, key, size)
            self.now += size
            self.most = max(self.most, self.now)

    def _part(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._meet(value, False)  # what an operation reads for the first time was there before
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._meet(value, True)
        return result
