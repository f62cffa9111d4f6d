"""No step waits for the device more often than the host's own: every number that Python reads back stalls a GPU.

Counted from a run's first model call on, so that what is looked at once, before sampling, does not count.
"""
from __future__ import annotations

from typing import Any

import pytest
import test_strangers
from comfy.patcher_extension import WrappersMP
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import mark_conditioning
from test_strangers import TECHNIQUES, TEXT, Stranger, Technique, guided, run
from torch import Tensor, ones
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")
READS_SIGMA = {"injection": 1}  # which state of the trajectory to read, and whether at all: once a step


class Reads(TorchDispatchMode):
    """Counts operations whose result Python waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.sampling = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.sampling and func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))

    def watch(self, model: Any, calls: list[str]) -> Any:
        def begin(executor: Any, *arguments: Any, **options: Any) -> Any:
            self.sampling = True
            return executor(*arguments, **options)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", begin)
        return clone


def reads_a_step(technique: Technique, monkeypatch: pytest.MonkeyPatch) -> float:
    counts = []
    for steps in (4, 8):
        monkeypatch.setattr(test_strangers, "STEPS", steps)
        test_strangers.trajectory.cache_clear()
        test_strangers.trajectory()
        reads = Reads()
        with reads:
            run(technique, Stranger(model=reads.watch), True, [])
        assert reads.sampling
        counts.append(reads.count)
    test_strangers.trajectory.cache_clear()
    return (counts[1] - counts[0]) / 4


def windowed(model: Any) -> tuple[Any, Any]:
    factors = ones(1, 77)
    factors[:, 3:7] = -2.0
    return patch_model(model), mark_conditioning(TEXT, SCALE_KEY, TokenScale(factors, 0.2, 0.8))


@pytest.mark.parametrize(("name", "technique"), [*TECHNIQUES.items(), ("windowed", Technique(guided, windowed))],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_a_step_waits_no_more_than_the_hosts(name: str, technique: Technique, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads_a_step(technique, monkeypatch) == READS_SIGMA.get(name, 0)


def test_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(model: Any) -> tuple[Any, Any]:
        def look(executor: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
            float(x.sum())
            return executor(x, *arguments, **options)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
        return clone, TEXT

    assert reads_a_step(Technique(guided, read), monkeypatch) >= 1
