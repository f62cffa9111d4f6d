"""What other nodes remember is put back between readings; what is no memory of theirs stays as they have it."""
from __future__ import annotations

import threading
from typing import Any

import comfy.model_patcher
import pytest
import tiny
import torch
from mixology.host.rewind import Rewind


class Node:
    """A node of another pack, with what a test gives it."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def act(self, arguments: Any) -> Any:
        return arguments


def options(node: Any) -> dict[str, Any]:
    return {"sampler_post_cfg_function": [node.act], "transformer_options": {}}


def readings(node: Any, change: Any, count: int = 3) -> None:
    """As many readings of a run, each from what the node remembered at its start."""
    memory = Rewind(options(node))
    for i in range(count):
        if i:
            memory.put_back()
        change(node)
    memory.hand_back()


def test_each_reading_starts_from_the_same_memory() -> None:
    seen: list[Any] = []

    def change(node: Any) -> None:
        seen.append(node.last)
        node.last = torch.ones(1)

    readings(Node(last=None), change)
    assert seen == [None] * 3


def test_counts_and_records_are_handed_back() -> None:
    node: Any = Node(calls=2, log=["a"])

    def change(node: Any) -> None:
        node.calls += 1
        node.log.append("b")

    readings(node, change)
    assert node.calls == 5 and node.log == ["a", "b", "b", "b"]


@pytest.mark.parametrize(("held", "change", "expected"), [
    ({"width": 0}, lambda node: setattr(node, "width", node.width or 8), {"width": 8}),
    ({"step": -1}, lambda node: setattr(node, "step", 3), {"step": 3}),
    ({"last": [1, 2]}, lambda node: node.last.__setitem__(slice(None), [*node.last, 3][-2:]), {"last": [2, 3]}),
], ids=["set once", "an index", "a list of two"])
def test_what_is_no_count_is_as_the_last_reading_left_it(held: Any, change: Any, expected: Any) -> None:
    node: Any = Node(**held)
    readings(node, change)
    assert vars(node) == expected


class ForeignPatcher(comfy.model_patcher.ModelPatcher):
    """As packs extend the host's own."""


def test_models_of_other_packs_stay_as_they_are() -> None:
    model = tiny.unet()
    foreign = ForeignPatcher(model.model, model.load_device, model.offload_device)
    foreign.backup["weight"] = 1
    readings(Node(model=foreign), lambda node: node.model.backup.update(other=2))
    assert dict(foreign.backup) == {"weight": 1, "other": 2}


def test_what_threads_share_stays_as_it_is() -> None:
    queue = Node(lock=threading.Lock(), waiting=["a prompt"])
    found: list[list[str]] = []

    def change(node: Any) -> None:
        node.server.waiting.append("another")
        found.append(list(node.server.waiting))

    readings(Node(server=queue), change, 2)
    assert found == [["a prompt", "another"], ["a prompt", "another", "another"]]
