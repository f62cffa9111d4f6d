"""Guiders and samplers on a compiled network; what patches attention has such tests of its own."""
from __future__ import annotations

import pytest
from strangers import STRANGERS
from test_strangers import PLAIN, TECHNIQUES, alone, distance, run, without

pytestmark = pytest.mark.slow


def test_compiling_alone_changes_nothing() -> None:
    calls: list[str] = []
    assert distance(run(PLAIN, STRANGERS["compiles"], True, calls), without("token scale")) < 1e-4
    assert calls, "nothing was compiled"


@pytest.mark.parametrize("technique", ["epsilon merge", "fusion", "layout mix", "cycle"])
def test_the_effect_is_there_on_a_compiled_network(technique: str) -> None:
    assert distance(run(TECHNIQUES[technique], STRANGERS["compiles"], True, []), alone(technique)) < 1e-3
