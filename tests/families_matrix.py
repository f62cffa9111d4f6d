"""What works on which family, as it is seen: verdicts, and the page that keeps them."""
from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import FAMILIES, MODERN, PECULIAR
from families_checks import CHECKS, Subject
from family import Family
from mixology.host.networks import family_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
ALL: dict[str, Family] = {**FAMILIES, **PECULIAR, **MODERN}
INTRODUCTION = """# Which models each technique works on

Written by `python3 tools/families.py`, held by `tests/test_families.py`. Each family is a tiny model of ComfyUI's own
class (version {version}) with random weights, run in float32 on a CPU: numbers are right, which does not yet say that
pictures are good. A number is the power of ten that the largest error stays below, as a fraction of the result's
deviation; *exact* is equal to the bit. A number in brackets leads to the sentence by which a technique refuses.
"""
CHECKED = "\n## What is compared\n\n"
REFUSALS = "\n## Refusals\n\n"
NONE = "None.\n"


@dataclass(frozen=True)
class Verdict:
    """What became of a technique on a family.

    Attributes:
        words: of a refusal, the model's name left out; what is wrong with a failure.
        error: of what works.
    """

    kind: str
    words: str = ""
    error: float = 0.0

    def same_as(self, other: Verdict) -> bool:
        """Errors depend on the machine."""
        return (self.kind, self.words) == (other.kind, other.words)


def is_ours(error: BaseException) -> bool:
    """Whether it was raised by the pack itself."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return not last.startswith((str(ROOT / "tests"), str(ROOT / ".mixology"))) and last.startswith(str(ROOT))


def judge(name: str, technique: str, subject: Subject) -> Verdict:
    """Runs a technique's check; a refusal is one of the pack's before the network ends a call, all else fails."""
    subject.network_calls = 0
    try:
        error = CHECKS[technique](subject)
    except Exception as problem:  # noqa: BLE001  (a crash is a verdict, too)
        if isinstance(problem, ValueError) and is_ours(problem) and subject.network_calls == 0:
            return Verdict("refused", re.sub(r"\bgot [^;,]+", "got ...", str(problem), count=1))
        return Verdict("fails", f"{type(problem).__name__}: {problem}".splitlines()[0])
    tolerance = ALL[name].tolerance
    return Verdict("works", error=error) if error < tolerance else Verdict("fails", f"{error:.1e} off")


def judge_all(name: str, techniques: Iterable[str] = tuple(CHECKS)) -> tuple[str, dict[str, Verdict]]:
    """What people call a family's model, and a verdict for each technique."""
    subject = Subject(ALL[name])
    return family_name(subject.model.model), {technique: judge(name, technique, subject) for technique in techniques}


# --------------------------------------------------------------------------------------------------- the page

def show_error(error: float) -> str:
    return "exact" if error == 0 else f"1e{max(-6, math.ceil(math.log10(error)))}"


def show(verdict: Verdict, notes: list[str]) -> str:
    """A cell; refusals go to the notes, each once."""
    if verdict.kind == "works":
        return show_error(verdict.error)
    if verdict.kind == "fails":
        return f"FAILS: {verdict.words}"
    if verdict.words not in notes:
        notes.append(verdict.words)
    return f"[{notes.index(verdict.words) + 1}]"


def render(rows: Mapping[str, tuple[str, Mapping[str, Verdict]]], version: str) -> str:
    """The page."""
    notes: list[str] = []
    lines = [f"| family | model | {' | '.join(CHECKS)} |", f"|{'---|' * (len(CHECKS) + 2)}"]
    lines += [f"| `{name}` | {model} | {' | '.join(show(cells[technique], notes) for technique in CHECKS)} |"
              for name, (model, cells) in rows.items()]
    return "".join((INTRODUCTION.format(version=version), "\n", "\n".join(lines), "\n", render_end(notes)))


def render_end(notes: list[str]) -> str:
    """What follows the table."""
    checks = "".join(f"- **{name}**: {describe(check)}\n" for name, check in CHECKS.items())
    refusals = "".join(f"{i}. {words}\n" for i, words in enumerate(notes, 1))
    return f"{CHECKED}{checks}{REFUSALS}{refusals or NONE}"


def describe(check: Any) -> str:
    return " ".join((check.__doc__ or "").split())


def read_page(text: str) -> tuple[dict[str, dict[str, Verdict]], str]:
    """The verdicts of a page by family and technique, errors unread, and what follows its table."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", text, re.MULTILINE)
    end = text[text.find(CHECKED):]
    notes = dict(re.findall(r"^(\d+)\. (.*)$", end, re.MULTILINE))

    def read(cell: str) -> Verdict:
        if cell.startswith("FAILS"):
            return Verdict("fails", cell)
        return Verdict("refused", notes[cell.strip("[]")]) if cell.startswith("[") else Verdict("works")

    verdicts = {name: dict(zip(CHECKS, map(read, cells.split(" | ")), strict=True)) for name, cells in rows}
    return verdicts, end
