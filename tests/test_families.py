"""The tiny families hear their prompts, their tokens stand as written down, and docs/families.md tells what works."""
from __future__ import annotations

from typing import Any

import families_rig as written
import pytest
from environment import MAIN, current
from families_checks import Subject, distance
from families_matrix import ALL, CHECKS, NONE, PAGE, ROOT, judge_all, read_page, render_end
from family import draw
from torch import Tensor

pytestmark = pytest.mark.seam

SHORT = ("token scale", "cross-attention merge", "feature injection")  # on hosts beside the main one
LOUD = [name for name, family in ALL.items() if not family.deaf]
Keys = list[tuple[int, Tensor]]  # queries, and keys by token [tokens, rest], of each call


@pytest.fixture
def subject(name: str) -> Subject:
    return Subject(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_the_prompt_matters(subject: Subject) -> None:
    one, other = (subject.sample(positive=subject.text(seed)) for seed in (1, 3))
    assert distance(one, other) > 0.01


def read_keys(model: Any, conditioning: list[Any], x: Tensor) -> Keys:
    calls: Keys = []

    def note(func: Any, q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        axis = 2 if kwargs.get("skip_reshape") else 1
        calls.append((q.shape[axis], k.movedim(axis, 0).flatten(1).clone()))
        return func(q, k, *rest, **kwargs)

    written.read_once(written.with_override(model, note), conditioning, x)
    return calls


def changed(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", LOUD)
def test_tokens_stand_where_the_table_says(subject: Subject) -> None:
    """In the first call that holds text: those whose keys change with the text, the picture, the references."""
    family, text = subject.family, subject.text(1)
    x = family.latent(1, *family.size)
    other = [[subject.text(3)[0][0], text[0][1]]]
    spans, total = written.find_spans(family, family.tokens)
    plain, worded, painted = (read_keys(subject.model, *given) for given in (
        (text, x), (other, x), (text, x + draw(*x.shape, seed=9))))
    if not family.joint:
        length = written.text_length(family, family.tokens)
        reading = [i for i, (queries, keys) in enumerate(plain) if len(keys) == length != queries]
        first = reading[0]
        assert changed(plain[first][1], worded[first][1]) == list(range(family.words or family.tokens))
        assert not changed(plain[first][1], painted[first][1]) and len(reading) > 1
        return
    first = next(i for i, (queries, keys) in enumerate(plain) if queries == len(keys) == total)
    for after, part in ((worded, "text"), (painted, "picture")):
        start, count = spans[part]
        padded = written.fill_up(count, family.multiple)  # refiners let words and padding mix
        found = changed(plain[first][1], after[first][1])
        if part == "text" and len(found) == total:
            continue  # a pooled text goes into all tokens
        assert found in ([*range(start, start + count)], [*range(start, start + padded)]), part
    if family.references:
        shapes = [latent + 1 for latent in text[0][1]["reference_latents"]]
        beside = read_keys(subject.model, [[text[0][0], {**text[0][1], "reference_latents": shapes}]], x)
        start, count = spans["references"]
        assert changed(plain[first][1], beside[first][1]) == [*range(start, start + count)]


# ------------------------------------------------------------------------------------ the page

@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
def test_the_page_tells_what_works(subject: Subject, name: str, page: str) -> None:
    """`python3 tools/families.py` writes it anew, where a refusal became a success."""
    techniques = tuple(CHECKS) if current().version == MAIN.version else SHORT
    _, verdicts = judge_all(name, techniques)
    promised, _ = read_page(page)
    assert {technique: verdict for technique, verdict in verdicts.items() if verdict.kind == "fails"} == {}
    stale = {technique: verdict for technique, verdict in verdicts.items()
             if not verdict.same_as(promised[name][technique])}
    assert not stale, f"docs/families.md says otherwise: {promised[name]}; run python3 tools/families.py"


def test_the_page_is_whole(page: str) -> None:
    """Every family, nothing that fails, each refusal once, and how it is checked today."""
    promised, end = read_page(page)
    assert list(promised) == list(ALL)
    verdicts = [verdict for row in promised.values() for verdict in row.values()]
    assert not [verdict for verdict in verdicts if verdict.kind == "fails"]
    refusals = dict.fromkeys(verdict.words for verdict in verdicts if verdict.kind == "refused")
    assert end == render_end(list(refusals))
    assert (NONE in end) == (not refusals)
    assert "](docs/families.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
