"""The templates in `workflows/` are what `tools/templates.py` makes of the nodes as they are."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graph import load_definitions
from templates import TEMPLATES


@pytest.fixture(scope="module")
def definitions(loaded_pack: dict[str, Any]) -> dict[str, Any]:
    return load_definitions()


def test_every_template_is_made_by_the_tool(root: Path) -> None:
    assert {path.stem for path in (root / "workflows").glob("*.json")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_committed_is_what_is_made(name: str, definitions: dict[str, Any], root: Path) -> None:
    committed = (root / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    assert TEMPLATES[name](definitions).render() == committed, f"run tools/templates.py: {name} has changed"
