"""Every node holds its numbers, choices and texts to its schema before it does anything, whoever hands them over."""
from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy
import pytest
from comfy_api.internal import make_locked_method_func
from comfy_api.latest import io
from mixology.nodes import MixologyExtension
from mixology.nodes.bounds import within_bounds
from mixology.nodes.fusion import Expert
from mixology.nodes.layout import LayoutMixKSampler, LayoutMixSampler
from mixology.nodes.mixer import MixerConditioning, MixerText

NODES: list[Any] = asyncio.run(MixologyExtension().get_node_list())
NUMBERS = [(node, socket) for node in NODES for socket in node.define_schema().inputs
           if socket.get_io_type() in ("INT", "FLOAT")]
TEXTS = [(node, socket) for node in NODES for socket in node.define_schema().inputs
         if socket.get_io_type() == "STRING"]
CHOICES = [(node, socket) for node in NODES for socket in node.define_schema().inputs
           if socket.get_io_type() == "COMBO" and node.__name__ not in ("LoadTrajectory", "DemoCheckpoint")]


class Untouched:
    """What comes through a socket; nothing may be asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


def ids(pair: tuple[Any, Any]) -> str:
    return f"{pair[0].__name__}.{pair[1].id}"


def run(node: Any, **changed: Any) -> Any:
    """As the host runs it: a locked clone of the class, widgets at their defaults."""
    schema = node.GET_SCHEMA()
    inputs = {socket.id: getattr(socket, "default", None) for socket in schema.inputs}
    inputs = {name: Untouched() if value is None else value for name, value in inputs.items()}
    clone, given = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}), {**inputs, **changed}
    if schema.is_input_list:
        given = {name: [value] for name, value in given.items()}
    return make_locked_method_func(node, node.FUNCTION, clone)(**given)


def refuse(node: Any, name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        run(node, **{name: value})
    assert str(caught.value).isprintable() and str(caught.value).startswith(
        f"{name} of {node.define_schema().display_name} expects ")


def test_there_are_numbers_in_all_techniques() -> None:
    assert len(NUMBERS) > 40 and len({node for node, _ in NUMBERS}) >= 14
    assert len(TEXTS) >= 8 and len(CHOICES) >= 10


@pytest.mark.parametrize("pair", NUMBERS, ids=ids)
def test_a_number_beyond_the_schema_is_refused(pair: tuple[Any, Any]) -> None:
    """None of these reaches the node's work, so that none asks for memory."""
    node, socket = pair
    whole = socket.get_io_type() == "INT"
    ends = (str(end) if whole else f"{end:g}" for end in (socket.min, socket.max))
    words = f"expects a {'whole ' if whole else ''}number from {' to '.join(ends)}, got "
    beyond = [math.nan, math.inf, -math.inf, socket.min - 1, socket.max + 1, 10 ** 30, 10 ** 5000, "7", None, [3]]
    for value in beyond + [socket.min + 0.5] * whole:
        refuse(node, socket.id, value, words)


@pytest.mark.parametrize("pair", TEXTS, ids=ids)
def test_a_text_that_is_none_is_refused(pair: tuple[Any, Any]) -> None:
    node, socket = pair
    refuse(node, socket.id, None, "expects a text, got None; type it in")
    refuse(node, socket.id, 3.0, r"expects a text, got 3\.0; type it in")
    refuse(node, socket.id, "ab\ud83d", r"got half a character \(\\ud83d\) at letter 3; type that part anew")


@pytest.mark.parametrize("pair", CHOICES, ids=ids)
def test_a_choice_that_is_none_is_refused(pair: tuple[Any, Any]) -> None:
    node, socket = pair
    for value in ("nothing", None, 0, ["euler"], "\u661f\n"):
        refuse(node, socket.id, value, f"expects one of its list, got '.*'; choose one of {socket.options[0]}")


# ------------------------------------------------------------------------------------------- what is allowed

class Every(io.ComfyNode):
    """A node of one widget of each kind, that hands back what it got."""

    choices = ["a", "b"]

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Every", display_name="Every", category="", inputs=[
            io.Int.Input("whole", default=0, min=-3, max=2 ** 64 - 1), io.Float.Input("real", default=0, min=-1, max=1),
            io.String.Input("text", default=""), io.Combo.Input("choice", options=list(cls.choices)),
            io.Image.Input("image", optional=True)], outputs=[])

    @classmethod
    @within_bounds
    def execute(cls, whole: Any, real: Any, text: Any, choice: Any, image: Any = None) -> io.NodeOutput:
        return io.NodeOutput(whole, real, text, choice, image)


@pytest.mark.parametrize("given", [
    (-3, -1.0, "", "a", None), (2 ** 64 - 1, 1.0, "\u661f\x00\n", "b", object()), (True, 1, "a" * 10 ** 6, "a", None),
    (0, -0.0, "\U0001f600", "b", math.nan), (7, 0.5, "nan", "b", "any"),
])
def test_what_the_schema_allows_passes_unchanged(given: tuple[Any, ...]) -> None:
    assert all(own is theirs for own, theirs in zip(Every.execute(*given).result, given))
    named = dict(zip(("whole", "real", "text", "choice", "image"), given))
    assert all(own is theirs for own, theirs in zip(run(Every, **named).result, given))


def test_numbers_of_numpy_become_pythons() -> None:
    """What a node counts on with them must not overflow, nor fail where a whole number is asked for."""
    whole, real, *_ = Every.execute(numpy.int64(7), numpy.float32(0.5), "", "a").result
    assert (type(whole), whole) == (int, 7) and (type(real), real) == (float, 0.5)


def test_a_list_that_has_grown_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs add samplers and schedulers to the host's lists after this pack was loaded."""
    run(Every, whole=0, real=0, text="", choice="a")
    with pytest.raises(ValueError, match="choice of Every expects one of its list, got 'c'; choose one of a, b"):
        run(Every, choice="c")
    monkeypatch.setattr(Every, "choices", ["a", "b", "c"])
    assert run(Every, choice="c").result[3] == "c"


def test_the_schema_is_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists files in some nodes."""
    MixerConditioning.GET_SCHEMA()
    monkeypatch.setattr(MixerConditioning, "define_schema", lambda: pytest.fail("made anew"))
    with pytest.raises(ValueError, match="slots of Mixer Conditioning expects a whole number from 0 to 77, got 78"):
        MixerConditioning.execute((), "concat", 78)


def test_values_by_place_are_held_too() -> None:
    for execute, given, words in (
        (MixerText.execute, (None, "a", math.nan), "strength of Mixer Text"),
        (Expert.execute, (None, None, None, 7.0, -1.0), "temperature of Fusion Expert"),
        (LayoutMixSampler.execute, (None, None, 2.0, 0.6, 0.3, ""), "nu of Layout Mix Sampler"),
        (LayoutMixKSampler.execute, (None, None, None, None, -1), "seed of KSampler"),
    ):
        with pytest.raises(ValueError, match=words):
            execute(*given)
