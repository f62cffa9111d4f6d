"""What else samples a mix: a graph in which a mix meets a prompt's text, or a model that was trained on prompts."""
from __future__ import annotations

import math
from dataclasses import dataclass

import folder_paths

from .demo import reads_prompts
from .graph import Graph, Link, class_of, follow, links_of, outputs_of, running_graph, type_of, typed_in
from .mixer_files import PROMPTS, brings_prompts
from .notices import show_notice

MIXED, ZEROED, DEMO = "MixologyMixerConditioning", "ConditioningZeroOut", "MixologyDemoCheckpoint"


@dataclass(frozen=True)
class Faults:
    """What is wrong with the graph around a mix, each in a sentence."""

    certain: str = ""
    likely: str = ""


def check_graph() -> None:
    """Shows what is likely to be wrong around the Mixer Conditioning that runs.

    Raises:
        ValueError: for what is certain.
    """
    faults = find_faults(*running_graph())
    if faults.certain:
        raise ValueError(faults.certain)
    if faults.likely:
        show_notice(faults.likely)


def fingerprint_graph() -> str:
    """Changes when something else is wrong around the Mixer Conditioning that is asked, so that it runs again."""
    faults = find_faults(*running_graph())
    return faults.certain or faults.likely


def find_faults(graph: Graph, node: str) -> Faults:
    """What is wrong around a Mixer Conditioning, by its id. One whose `model` is connected checks that one itself."""
    readers = dict.fromkeys(reader for reader, name in follow(graph, (node, 0)) if name != "negative")
    samplers = [reader for reader in readers if find_model(graph, reader) is not None]
    if any(reads_text(graph, sampler) for sampler in samplers):
        return Faults(certain=(
            "Mixer Conditioning expected its own negative beside its positive, got a prompt's text at the sampler's "
            "negative, which a model for image embeddings does not understand; connect the negative output of Mixer "
            "Conditioning."))
    loaders = [] if "model" in links_of(graph, node) else [find_loader(graph, sampler) for sampler in samplers]
    names = [typed_in(graph, loader, "name") for loader in loaders if class_of(graph, loader) == DEMO]
    if any(map(reads_prompts, names)):
        return Faults(certain=describe_demo(next(filter(reads_prompts, names))))
    return Faults(likely=PROMPTS if any(loads_prompts(graph, loader) for loader in loaders) else "")


def describe_demo(name: str) -> str:
    return (f"Mixer Conditioning expected a model that was trained on image embeddings, got the demo checkpoint "
            f"{name}, which was trained on prompts; choose mixer in Demo Checkpoint.")


def find_model(graph: Graph, node: str) -> Link | None:
    """Where a sampler or guider has its model from; None of a node that reads none."""
    link = links_of(graph, node).get("model")
    return link if link is not None and type_of(graph, link) == "MODEL" else None


def find_loader(graph: Graph, node: str) -> str:
    """The node that a sampler's model begins at; one that joins several models ends the search."""
    seen: set[str] = set()
    while node not in seen:
        seen.add(node)
        models = [link for link in links_of(graph, node).values() if type_of(graph, link) == "MODEL"]
        node = models[0][0] if len(models) == 1 else node
    return node


def loads_prompts(graph: Graph, loader: str) -> bool:
    """Whether a node loads a checkpoint whose file brings a text encoder."""
    name = typed_in(graph, loader, "ckpt_name")
    path = folder_paths.get_full_path("checkpoints", name) if isinstance(name, str) else None
    return path is not None and brings_prompts(path)


def reads_text(graph: Graph, sampler: str) -> bool:
    """Whether a sampler's negative is a prompt's text. At cfg 1 no sampler reads its negative."""
    negative, cfg = links_of(graph, sampler).get("negative"), typed_in(graph, sampler, "cfg")
    if negative is None or (isinstance(cfg, int | float) and math.isclose(cfg, 1.0)):
        return False
    return is_text(graph, negative)


def is_text(graph: Graph, link: Link, seen: frozenset[Link] = frozenset()) -> bool:
    """Whether a conditioning holds what a text encoder made, be it through nodes that change it."""
    node, links = link[0], links_of(graph, link[0])
    if link in seen or class_of(graph, node) in (MIXED, ZEROED):
        return False
    types = {name: type_of(graph, source) for name, source in links.items()}
    if "CLIP" in types.values():
        return True
    outputs = outputs_of(graph, node)
    title = outputs[link[1]][1] if link[1] < len(outputs) else ""
    sources = {name: source for name, source in links.items() if types[name] == "CONDITIONING"}
    named = [sources[title]] if title in sources else list(sources.values())
    return any(is_text(graph, source, seen | {link}) for source in named)
