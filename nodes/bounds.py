"""What a schema allows, held for every value that a node is run with.

The host holds what users type against the schema, all but NaN, and what they connect not at all. A number beyond it can
ask for more memory than there is, and NaN paints a picture of nothing.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from comfy_api.latest import io

from ..samplers.numbers import check_number
from ..samplers.wording import check_text, legible

Execute = Callable[..., io.NodeOutput]


def within_bounds(execute: Execute) -> Execute:
    """A node's `execute` that refuses numbers, choices and texts beyond its schema in one sentence, before all else."""
    names = tuple(signature(execute).parameters)

    @wraps(execute)
    def checked(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = {**dict(zip(names, (cls, *args))), **kwargs}
        schema: io.Schema = cls.SCHEMA or cls.define_schema()  # the host keeps it from when it loaded the pack
        for socket in schema.inputs:
            if socket.id in given:
                name = f"{socket.id} of {schema.display_name}"
                value, many = given[socket.id], schema.is_input_list and isinstance(given[socket.id], list)
                given[socket.id] = [check_value(one, socket, name, cls) for one in value] if many else check_value(
                    value, socket, name, cls)
        return execute(**given)

    return checked


def check_value(value: Any, socket: Any, name: str, cls: type[io.ComfyNode]) -> Any:
    """A value as its node takes it. Raises ValueError if it is not one that its input takes. Sockets without a widget
    take what they get."""
    kind = socket.get_io_type()
    if kind in ("INT", "FLOAT"):
        return check_number(value, name, socket.min, socket.max, whole=kind == "INT")
    if kind == "STRING":
        check_text(value, name)
    elif kind == "COMBO" and socket.id not in signature(cls.validate_inputs).parameters:
        check_choice(value, socket, name, cls)
    return value


def check_choice(value: Any, socket: Any, name: str, cls: type[io.ComfyNode]) -> None:
    """Raises ValueError if a value is none of a list's. The host's own lists grow: what the kept one lacks, a new one
    may have."""
    if isinstance(value, str) and value in socket.options:
        return
    options = next(other.options for other in cls.define_schema().inputs if other.id == socket.id)
    if not isinstance(value, str) or value not in options:
        raise ValueError(
            f"{name} expects one of its list, got '{legible(value)}'; choose one of "
            f"{legible(', '.join(options), 200)}.")
