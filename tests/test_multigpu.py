"""Every technique on the host's MultiGPU CFG Split, with two CPUs for two cards: the same effect on whichever card."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.model_management
import injection_rig
import pytest
import test_strangers
import torch
from comfy.patcher_extension import WrappersMP
from families import sd1
from families_checks import CHECKS, Subject
from families_matrix import ALL
from mixology.host.injection import inject_features
from test_strangers import ALONE, TECHNIQUES, Stranger, distance, run

CARDS = [torch.device("cpu"), torch.device("cpu", 0)]
SELECTED = ("sd1", "sdxl", "sd3", "flux_schnell", "z_image", "qwen_edit", "wan21_t2v")


@pytest.fixture(autouse=True)
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two devices for the host."""
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices",
                        lambda exclude_current=False: CARDS[int(exclude_current):])
    yield
    comfy.model_management.unload_all_models()


def split(model: Any, calls: list[str]) -> Any:
    """The host's node; `calls` gets which network was asked, at each call."""
    from comfy import multigpu  # older hosts have none, and leave these tests out

    model = multigpu.create_multigpu_deepclones(model, 2, reuse_loaded=False)

    def note(executor: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(str(id(executor.class_obj)))
        return executor(*arguments, **options)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", note)
    return model


def reloadable(make: Any, *arguments: Any) -> Any:
    """A model that the host can load once more, for the other card."""
    model = make(*arguments)
    model.cached_patcher_init = (make, arguments)
    return model


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_node_before_and_behind(name: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_strangers, "base", lambda seed=0: reloadable(sd1, seed))
    calls: list[str] = []
    found = run(TECHNIQUES[name], Stranger(model=split), before, calls)
    assert len(set(calls)) >= 2, "one card only was asked"
    assert distance(found, run(TECHNIQUES[name], ALONE, True, [])) < 1e-3


@dataclass
class SplitSubject(Subject):
    """A family's model over two cards."""

    @cached_property
    def model(self) -> Any:
        return split(reloadable(self.family.model), self.calls)

    @cached_property
    def calls(self) -> list[str]:
        return []


@pytest.mark.parametrize("technique", [name for name in CHECKS if name not in ("invert + start", "feature injection")])
@pytest.mark.parametrize("name", SELECTED)
def test_families(name: str, technique: str) -> None:
    """The checks of docs/families.md, whose other side is written out in float64."""
    subject = SplitSubject(ALL[name])
    error = CHECKS[technique](subject)
    assert len(set(subject.calls)) >= 2, "one card only was asked"
    assert error < max(ALL[name].tolerance, 1e-4)


@pytest.mark.parametrize("name", SELECTED)
def test_injection(name: str) -> None:
    """Inversion asks one prompt at a time, so one card; its states are read on that card and laid over on both."""
    subject, both = Subject(ALL[name]), SplitSubject(ALL[name])
    features = 0.6 if ALL[name].unet else 0.0
    found = [injection_rig.run(one.guider(inject_features(
        one.model, subject.trajectory, subject.text(3, 2 if not ALL[name].fixed else 1), 0.8, features)),
        subject.trajectory) for one in (subject, both)]
    assert len(set(both.calls)) >= 2, "one card only was asked"
    assert distance(*found) < 1e-3
