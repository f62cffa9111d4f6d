"""The end of an inversion is noise already: sampler nodes in the prompt that add more lose the picture."""
from __future__ import annotations

from .graph import Graph, class_of, follow, links_of, running_graph, typed_in
from .notices import show_notice

RANDOM = "RandomNoise"  # the host's node of that noise
SWITCHES = {"KSamplerAdvanced": "enable", "SamplerCustom": True}  # what their add_noise says if they add some
ALWAYS = ("KSampler", "MixologyLayoutNoise")


def warn_of_added_noise(output: int) -> None:
    """Shows a notice on each node that adds noise to the end of an inversion.

    Args:
        output: which one of the node that is asked hands it out.
    """
    graph, node = running_graph()
    for reader in find_noisers(graph, node, output):
        show_notice(
            "This node adds noise to the latent output of an inversion, which is noise already, so that nothing is "
            "left of the picture; use Start from Trajectory and SamplerCustomAdvanced, or KSampler (Cocktail).",
            reader)


def find_noisers(graph: Graph, node: str, output: int) -> list[str]:
    """The nodes that add noise to what an output hands out, be it through nodes that change it."""
    return list(dict.fromkeys(reader for reader, name in follow(graph, (node, output)) if adds_noise(graph, reader)))


def adds_noise(graph: Graph, node: str) -> bool:
    """Whether a node is known to add noise to its latent, as it is set."""
    kind = class_of(graph, node)
    noise = links_of(graph, node).get("noise")
    return kind in ALWAYS or (kind in SWITCHES and typed_in(graph, node, "add_noise") == SWITCHES[kind]) or (
        kind == "SamplerCustomAdvanced" and noise is not None and class_of(graph, noise[0]) == RANDOM)
