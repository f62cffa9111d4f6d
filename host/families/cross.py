"""Diffusion transformers that read text through cross-attention: pictures attend to themselves, then to the text."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...attention_patches.sequence import TokenSequence
from ..networks import find_network
from .joint import count_tokens


@dataclass(frozen=True)
class CrossFamily:
    """What a transformer of this kind offers.

    Attributes:
        blocks: its list of blocks; more: lists of blocks beside them, which read the text as well.
        own: the part of a block that attends among the picture's tokens.
        values: what makes the text's values in a block, a layer that works on each token alone.
        picture_values: what makes values of a picture's features in a block, and of the text in a call without them.
        side: of an image token in a latent; the network's own patch size without it.
        context: tokens that a text has inside the network; 0 for as many as outside.
        wraps: see `JointFamily`.
        hides: whether it leaves out tokens of a text by its `attention_mask`.
        pictures: of a video, in each latent frame but the first, which holds one.
    """

    blocks: str
    own: str
    values: str
    picture_values: str = ""
    more: tuple[str, ...] = ()
    side: int = 0
    context: int = 0
    wraps: bool = True
    hides: bool = False
    pictures: int = 4

    def list_readers(self, network: Any) -> list[Any]:
        """What attends to the text, or to a text and a picture."""
        reader = self.values.rpartition(".")[0]
        return [block.get_submodule(reader) for block in self.list_reading(network)]

    def list_reading(self, network: Any) -> list[Any]:
        """All blocks that read the text."""
        return [block for name in (self.blocks, *self.more) for block in getattr(network, name)]

    def list_values(self, network: Any, given: Mapping[str, Any]) -> list[tuple[Any, list[Any]]]:
        """What attends to the text, each with its layers that make values of it, in a call.

        Args:
            given: the call's arguments by name.
        """
        found = []
        for reader in self.list_readers(network):
            layers = [reader.get_submodule(self.values.rpartition(".")[2])]
            twin = self.picture_values.rpartition(".")[2]
            if twin and given.get("clip_fea") is None and hasattr(reader, twin):
                layers.append(reader.get_submodule(twin))
            found.append((reader, layers))
        return found

    def list_blocks(self, network: Any) -> list[Any]:
        """What attends among the picture's tokens."""
        return [block.get_submodule(self.own) for block in getattr(network, self.blocks)]

    def find_positions(self, network: Any) -> None:
        """A picture's positions never follow the text."""

    def find_side(self, network: Any) -> int:
        """Of an image token, in a latent's cells."""
        side = self.side or getattr(network, "patch_spatial", 0) or network.patch_size
        return side if isinstance(side, int) else side[-1]

    def sequence(self, network: Any, given: Mapping[str, Any]) -> TokenSequence:
        """The tokens of the picture's own attention in a call, whose arguments are given by name."""
        frames, height, width = count_tokens(given["x"], self.find_side(network))
        tokens = frames * height * width
        return TokenSequence(text=(0, 0), picture=(0, tokens), pictures=(0, tokens), total=tokens, grid=(height, width),
                             frames=frames)


WAN = CrossFamily("blocks", own="self_attn", values="cross_attn.v", picture_values="cross_attn.v_img")
MINI_TRAIN = CrossFamily("blocks", own="self_attn", values="cross_attn.v_proj")
# By the network's own class: those that extend one of these have more parts that read the text.
FAMILIES = {f"comfy.ldm.{name}": family for name, family in {
    "wan.model.WanModel": WAN,
    "wan.model.CameraWanModel": WAN,
    "wan.model.VaceWanModel": replace(WAN, more=("vace_blocks",)),
    "cosmos.predict2.MiniTrainDIT": MINI_TRAIN,
    "anima.model.Anima": CrossFamily("blocks", own="self_attn", values="cross_attn.v_proj", context=512),
    "lightricks.model.LTXVModel": CrossFamily(
        "transformer_blocks", own="attn1", values="attn2.to_v", side=1, hides=True, pictures=8),
}.items()}


def find_cross(model: Any) -> CrossFamily | None:
    """What a BaseModel's network offers, if it is of this kind and known here."""
    return find_cross_network(find_network(model))


def makes_videos(model: Any) -> bool:
    """Whether a BaseModel's latents may have several frames and its network reads text through cross-attention."""
    family = find_cross(model)
    return family is not None and not family.context


def find_cross_network(network: Any) -> CrossFamily | None:
    """As `find_cross`, of a network."""
    kind = type(network)
    return FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
