"""Lists of settings: what people write, what comes of it, and what is refused."""
from __future__ import annotations

import itertools

import pytest
from mixology.samplers.sweep import MOST, Axis, combine, parse_axis


@pytest.mark.parametrize(("text", "values"), [
    ("0.1, 0.3", (0.1, 0.3)),
    ("0:1:5", (0.0, 0.25, 0.5, 0.75, 1.0)),
    ("0:1:4", (0.0, 0.3333333333, 0.6666666667, 1.0)),
    ("-2:2:5", (-2, -1, 0, 1, 2)),
    ("1:0:3, 5", (1.0, 0.5, 0.0, 5.0)),
    ("7:7:1", (7,)),
    ("20, 30;40\n50", (20, 30, 40, 50)),
    ("1., 2", (1.0, 2.0)),
    ("1e-3,", (0.001,)),
    ("euler, dpmpp_2m sde", ("euler", "dpmpp_2m sde")),
])
def test_lists(text: str, values: tuple[object, ...]) -> None:
    found = parse_axis(text, "values").values
    assert found == values and [type(value) for value in found] == [type(value) for value in values]


def test_a_name_is_in_the_labels() -> None:
    axis = parse_axis(" nu = 0, 0.333333333333", "values")
    assert axis.name == "nu" and axis.labels == ["nu 0", "nu 0.333333"]
    assert parse_axis("0.5", "values").labels == ["0.5"]


@pytest.mark.parametrize(("text", "words"), [
    ("", "got nothing"), (" , ", "got nothing"), ("cfg =", "got nothing"),
    ("0:1", r"start:end:count, .* got '0:1' at place 1"), ("0.1, 0:1:x", "'0:1:x' at place 2"),
    ("0:1:0", "at place 1"), ("0:inf:3", "at place 1"), ("a:b:3", "at place 1"), ("0:1:2:3", "at place 1"),
    ("0.1, O.2", r"got both: 'O\.2' at place 2"), ("euler, 2", "got both: '2' at place 2"),
    ("0:1:1001", f"at most {MOST}"), ("0:1:99999999999", f"at most {MOST}"),
    ("nan, 1", "finite numbers, got 'nan' at place 1"), ("1, -inf", "finite"),
])
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^values expects .*{words}.*; .*\\.$") as caught:
        parse_axis(text, "values")
    assert "\n" not in str(caught.value)


def test_combinations_are_read_like_a_grid() -> None:
    axes = [Axis((1, 2, 3)), Axis(("a", "b")), Axis((0.5, 0.75))]
    found = combine(axes)
    assert found[:4] == [(1, "a", 0.5), (2, "a", 0.5), (3, "a", 0.5), (1, "b", 0.5)]
    assert sorted(map(str, found)) == sorted(map(str, itertools.product(*(axis.values for axis in axes))))
    with pytest.raises(ValueError, match=f"The sweep expects at most {MOST} values, got 1024 or more"):
        combine([Axis(tuple(range(32))), Axis(tuple(range(32)))])
