"""The prompt that the host runs, as a graph of nodes: who reads an output, and where an input comes from."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comfy_execution.utils import get_executing_context

from .notices import find_server

Graph = Mapping[str, Any]  # by id, a node's class_type and inputs, as the host's interface sends them
Link = tuple[str, int]  # a node and one of its outputs


def running_graph() -> tuple[Graph, str]:
    """The prompt that runs, and the id in it of the node that is asked; an empty one where that cannot be known."""
    context = get_executing_context()
    server = None if context is None else find_server()
    if context is not None and server is not None:
        running, _ = server.prompt_queue.get_current_queue_volatile()
        for item in running:
            if item[1] == context.prompt_id and context.node_id in item[2]:
                return item[2], context.node_id
    return {}, ""


def class_of(graph: Graph, node: str) -> str:
    return str(graph.get(node, {}).get("class_type", ""))


def links_of(graph: Graph, node: str) -> dict[str, Link]:
    """The inputs of a node that are connected, by name."""
    inputs = graph.get(node, {}).get("inputs", {})
    return {name: (value[0], int(value[1])) for name, value in inputs.items()
            if isinstance(value, list | tuple) and len(value) == 2 and value[0] in graph}


def typed_in(graph: Graph, node: str, name: str) -> Any:
    """What a user typed into an input; None of one that is connected or not there."""
    return None if name in links_of(graph, node) else graph.get(node, {}).get("inputs", {}).get(name)


def readers(graph: Graph, link: Link) -> list[tuple[str, str]]:
    """The inputs that an output is connected to: node and name."""
    return [(node, name) for node in graph for name, source in links_of(graph, node).items() if source == link]


def is_unread(output: int) -> bool:
    """Whether nothing in the prompt that runs reads an output of the node that is asked."""
    graph, node = running_graph()
    return node in graph and not readers(graph, (node, output))


def outputs_of(graph: Graph, node: str) -> list[tuple[str, str]]:
    """Type and name of each output of a node; none of one that the host does not know."""
    import nodes  # the host's, not the room of that name

    mappings: dict[str, Any] = nodes.NODE_CLASS_MAPPINGS
    kind = mappings.get(class_of(graph, node))
    types: Sequence[Any] = getattr(kind, "RETURN_TYPES", None) or ()
    names: Sequence[Any] = getattr(kind, "RETURN_NAMES", None) or types
    return [(str(one), str(name)) for one, name in zip(types, names)]


def type_of(graph: Graph, link: Link) -> str:
    """The type of an output, such as MODEL; empty where it is not known."""
    outputs = outputs_of(graph, link[0])
    return outputs[link[1]][0] if link[1] < len(outputs) else ""


def passed_on(graph: Graph, node: str, name: str, kind: str) -> list[Link]:
    """The outputs of a type that hand on what a node reads at an input: those of its name, if there are any."""
    found = [(index, title) for index, (one, title) in enumerate(outputs_of(graph, node)) if one == kind]
    named = [index for index, title in found if title == name]
    return [(node, index) for index in named or [index for index, _ in found]]


def follow(graph: Graph, link: Link, seen: frozenset[Link] = frozenset()) -> Iterator[tuple[str, str]]:
    """The inputs that an output reaches, also through nodes that change what it holds; not beyond those that sample."""
    if link in seen:
        return
    kind = type_of(graph, link)
    for node, name in readers(graph, link):
        yield node, name
        for further in [] if samples(graph, node) else passed_on(graph, node, name, kind):
            yield from follow(graph, further, seen | {link})


def samples(graph: Graph, node: str) -> bool:
    """Whether a node reads a model or a guider, so that a latent which it hands on is another."""
    return any(type_of(graph, link) in ("MODEL", "GUIDER") for link in links_of(graph, node).values())
