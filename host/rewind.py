"""Puts back what nodes of other packs remember between model calls, so that each reading of a picture has its own.

Guidance with momentum, caches and the like keep what they saw last: in the options of the run, in variables of the
functions that hang on the model, or in objects that these hold. Two readings in one run would share it. A `Rewind`
notes all of it where a run begins and puts it back, in place, before the next reading.

Records are no state: what was only appended to a list or set, counted up by one at each call or put under a new name is
handed back when the run ends. The host, its server, networks, models and whatever several threads share are left alone.
"""
from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

MISSING: Any = object()
ATOMS = (str, bytes, int, float, complex, type(None), torch.Tensor, torch.dtype, torch.device)
OWN = __name__.partition(".host")[0]
# Objects of these keep no state of a reading, or have it kept by the host; those that extend the host's neither.
HOST = {"comfy", "comfy_api", "comfy_execution", "torch", "server", "execution", "nodes", "node_helpers", "app",
        "latent_preview", "folder_paths", "api_server", "middleware", "aiohttp"}
CLOSED = {*sys.stdlib_module_names - {"types"}, *HOST, "numpy", "tqdm", "PIL", "safetensors", "transformers"}
THREADS = {"_thread", "threading", "queue", "asyncio"}  # whoever holds one of theirs is used by several threads


def is_count(value: Any) -> bool:
    return type(value) is int


@dataclass
class NamedValues:
    """A dict, or the attributes of an object."""

    held: dict[Any, Any]
    start: dict[Any, Any]
    counted: dict[Any, int] = field(default_factory=dict)
    added: dict[Any, Any] = field(default_factory=dict)

    def put_back(self, calls: int) -> None:
        held, start = self.held, self.start
        if len(held) == len(start) and all(held.get(key, MISSING) is value for key, value in start.items()):
            return
        for key, value in held.items():
            if is_count(value) and is_count(start.get(key)) and value == start[key] + calls:
                self.counted[key] = self.counted.get(key, 0) + calls
            elif key not in start:
                self.added[key] = value
        held.clear()
        held.update(start)

    def hand_back(self) -> None:
        for key, value in self.added.items():
            self.held.setdefault(key, value)
        for key, count in self.counted.items():
            if is_count(self.held.get(key)):
                self.held[key] += count


@dataclass
class Items:
    """A list or deque."""

    held: Any
    start: list[Any]
    gained: list[Any] = field(default_factory=list)
    only_grew: bool = True

    def put_back(self, calls: int) -> None:
        now, start = list(self.held), self.start
        grown = len(now) >= len(start) and all(a is b for a, b in zip(start, now))
        if grown and len(now) == len(start):
            return
        self.only_grew = self.only_grew and grown
        self.gained += now[len(start):]
        self.held.clear()
        self.held.extend(start)

    def hand_back(self) -> None:
        if self.gained and self.only_grew and isinstance(self.held, list):
            self.held[len(self.start):len(self.start)] = self.gained


@dataclass
class Members:
    """A set."""

    held: set[Any]
    start: set[Any]
    gained: set[Any] = field(default_factory=set)

    def put_back(self, calls: int) -> None:
        self.gained |= self.held - self.start
        self.held.clear()
        self.held |= self.start

    def hand_back(self) -> None:
        self.held |= self.gained


@dataclass
class Variable:
    """A variable that a function shares with the one it was made in."""

    held: types.CellType
    start: Any
    counted: int = 0

    def put_back(self, calls: int) -> None:
        now = read_cell(self.held)
        if now is self.start:
            return
        if is_count(now) and is_count(self.start) and now == self.start + calls:
            self.counted += calls
        if self.start is MISSING:
            del self.held.cell_contents
        else:
            self.held.cell_contents = self.start

    def hand_back(self) -> None:
        now = read_cell(self.held)
        if self.counted and is_count(now):
            self.held.cell_contents += self.counted


@dataclass
class Chance:
    """A random generator."""

    held: torch.Generator
    start: torch.Tensor

    def put_back(self, calls: int) -> None:
        self.held.set_state(self.start)

    def hand_back(self) -> None:
        pass


def read_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return MISSING


def note_place(thing: Any) -> Any:
    """How to put back what `thing` itself holds; None if it holds nothing that could change."""
    if isinstance(thing, dict):
        return NamedValues(thing, dict(thing))
    if isinstance(thing, list | deque):
        return Items(thing, list(thing))
    if isinstance(thing, set):
        return Members(thing, set(thing))
    if isinstance(thing, types.CellType):
        return Variable(thing, read_cell(thing))
    if isinstance(thing, torch.Generator):
        return Chance(thing, thing.get_state())
    return None


def is_closed(thing: Any) -> bool:
    """Whether a function's or object's inside is left alone: the host's, a library's, ours, a network or a guider."""
    if isinstance(thing, types.FunctionType):
        return is_of(thing.__module__, CLOSED)
    if isinstance(thing, type | types.ModuleType):
        return True
    kinds = type(thing).__mro__
    return is_of(kinds[0].__module__, CLOSED) or any(is_of(kind.__module__, HOST) for kind in kinds)


def is_of(module: Any, packages: set[str]) -> bool:
    """Whether a module belongs to one of some packages, or to this one."""
    name = str(module)
    return name.partition(".")[0] in packages or name == OWN or name.startswith(f"{OWN}.")


def is_shared(thing: Any) -> bool:
    """Whether an object holds what threads wait for each other with."""
    return any(is_of(type(part).__module__, THREADS) for part in vars(thing).values())


def look_inside(thing: Any) -> list[Any]:
    """What a thing reaches."""
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | deque):
        return list(thing)
    if isinstance(thing, types.CellType):
        return [read_cell(thing)]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if is_closed(thing):
        return []
    if isinstance(thing, types.FunctionType):
        return [*(thing.__closure__ or ()), thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    return [vars(thing)] if hasattr(thing, "__dict__") and not is_shared(thing) else []


def walk(roots: tuple[Any, ...]) -> Iterator[Any]:
    """All that is reached from the roots, once each."""
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, ATOMS) or id(thing) in seen:
            continue
        seen[id(thing)] = thing  # held, so that no other thing gets its id
        yield thing
        waiting += look_inside(thing)


class Rewind:
    """What hangs on the given model options remembers when this is made.

    `put_back` between two readings; `hand_back` once at the end, after the last reading.
    """

    def __init__(self, *model_options: dict[str, Any]):
        found = (note_place(thing) for thing in walk(model_options))
        self.places = [place for place in found if place is not None]

    def put_back(self, calls: int = 1) -> None:
        """
        Args:
            calls: of the model since this was made or last put back.
        """
        for place in self.places:
            place.put_back(calls)

    def hand_back(self) -> None:
        for place in self.places:
            place.hand_back()
