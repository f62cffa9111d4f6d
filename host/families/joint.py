"""Diffusion transformers in which text and picture share one sequence of tokens, and where each stands in it."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention_patches.sequence import TokenSequence
from ..networks import find_network, is_kind
from .together import (
    Together,
    with_ids,
    with_ids_and_fusion,
    with_own_embedder,
    with_refiners,
    with_registers,
    without_positions,
)

LONG_TEXT = 512  # tokens to which a model that pads in front makes a text
SECOND = {  # the second text of a call, [rows, ..., tokens, width], and the same in a conditioning
    "encoder_hidden_states_llama3": "conditioning_llama3", "txt_byt5": "conditioning_byt5small"}


@dataclass(frozen=True)
class CallSizes:
    """What the length of a call's sequence depends on.

    Attributes:
        text: tokens of its text; second: of a second one; grid: of one frame of its picture down and across.
        frames: of the picture; references: tokens of reference pictures; seen: of pictures that a text encoder saw.
    """

    text: int
    grid: tuple[int, int]
    frames: int = 1
    references: int = 0
    second: int = 0
    seen: int = 0

    @property
    def picture(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]

    def sequence(self, text: int, picture: int, pictures: tuple[int, int], total: int, *, words: int | None = None,
                 ) -> TokenSequence:
        """Args: text, picture: their first tokens; words: of the text, where it is not as long as its conditioning."""
        return TokenSequence(
            text=(text, self.text if words is None else words), picture=(picture, self.picture), pictures=pictures,
            total=total, grid=self.grid, frames=self.frames, references=self.references)


def text_first(network: Any, sizes: CallSizes) -> TokenSequence:
    """[text, picture, references]"""
    pictures = sizes.picture + sizes.references
    return sizes.sequence(0, sizes.text, (sizes.text, pictures), sizes.text + pictures)


def after_registers(network: Any, sizes: CallSizes) -> TokenSequence:
    """[learned registers, text, picture]"""
    before = network.register_tokens.shape[1]
    first = before + sizes.text
    return sizes.sequence(before, first, (first, sizes.picture), first + sizes.picture)


def picture_last(network: Any, sizes: CallSizes) -> TokenSequence:
    """[text, references, picture]"""
    pictures = sizes.picture + sizes.references
    return sizes.sequence(0, sizes.text + sizes.references, (sizes.text, pictures), sizes.text + pictures)


def picture_first(network: Any, sizes: CallSizes) -> TokenSequence:
    """[picture, text]"""
    return sizes.sequence(sizes.picture, 0, (0, sizes.picture), sizes.text + sizes.picture)


def with_padding(network: Any, sizes: CallSizes) -> TokenSequence:
    """[text, padding, picture, padding], each up to a multiple of tokens that all read; references are not known."""
    multiple = network.pad_tokens_multiple or 1
    text, picture = (math.ceil(tokens / multiple) * multiple for tokens in (sizes.text, sizes.picture))
    return sizes.sequence(0, text, (text, sizes.picture), text + picture)


def with_two_texts(network: Any, sizes: CallSizes) -> TokenSequence:
    """[picture, text, second text, second text of the block's own]"""
    words = sizes.text + 2 * sizes.second
    return sizes.sequence(sizes.picture, 0, (0, sizes.picture), sizes.picture + words, words=words)


def with_quotes(network: Any, sizes: CallSizes) -> TokenSequence:
    """[pictures as CLIP sees them, text, second text, picture], or the second text before the first."""
    words = sizes.text + (0 if network.byt5_in is None else sizes.second)
    first = sizes.seen + words
    return sizes.sequence(sizes.seen, first, (first, sizes.picture), first + sizes.picture, words=words)


def lay_twice(network: Any, words: Tensor, second: Tensor) -> Tensor:
    """Factors as `with_two_texts` has the words."""
    return torch.cat([words, second, second], dim=1)


def lay_quotes(network: Any, words: Tensor, second: Tensor) -> Tensor:
    """Factors as `with_quotes` has the words: HunyuanVideo 1.5 tells its texts apart, and begins with the second."""
    if network.byt5_in is None:
        return words
    parts = [words, second] if network.cond_type_embedding is None else [second, words]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class JointFamily:
    """What a transformer of this kind offers.

    Attributes:
        blocks: its lists of blocks that attend among text and picture, in the order they run.
        place: where tokens stand in a call of so many.
        side: of an image token in a latent; the network's own patch size without it.
        wraps: whether the network has a place for wrappers of its own around a call.
        positions: which argument of a block holds the rotations of positions, by place and by name, where a picture's
            positions follow the length of the text; None where they do not. See `find_positions`.
        optional: whether it may leave reference pictures out.
        together: how the texts of several prompts stand in one call; None where they cannot.
        lay: factors [values, tokens] of the words and of a second text's, as `place` has them; None without such.
    """

    blocks: tuple[str, ...]
    place: Callable[[Any, CallSizes], TokenSequence] = text_first
    side: int = 0
    wraps: bool = True
    positions: tuple[int, str] | None = None
    optional: bool = False
    together: Together | None = None
    lay: Callable[[Any, Tensor, Tensor], Tensor] | None = None

    def list_blocks(self, network: Any) -> list[Any]:
        return [block for name in self.blocks for block in getattr(network, name)]

    def find_positions(self, network: Any) -> tuple[int, str] | None:
        """See `positions`. Of Flux's networks only LongCat-Image's, which counts its text across and down."""
        counted = getattr(getattr(network, "params", None), "txt_ids_dims", (1, 2))
        return self.positions if {1, 2} & set(counted) else None

    def find_side(self, network: Any) -> int:
        """Of an image token, in a latent's cells."""
        side = self.side or getattr(network, "patch", 0) or network.patch_size
        return side if isinstance(side, int) else side[-1]

    def sequence(self, network: Any, given: Mapping[str, Any]) -> TokenSequence:
        """Where tokens stand in a call, by its arguments' names in the network."""
        side = self.find_side(network)
        frames, *grid = count_tokens(given["x"], side)
        second = next((given[name] for name in SECOND if given.get(name) is not None), None)
        seen = given.get("clip_fea")
        placed = self.place(network, CallSizes(
            text=given["context"].shape[1], second=0 if second is None else second.shape[-2], grid=(grid[0], grid[1]),
            frames=frames, references=count_picture_tokens(given.get("ref_latents") or [], side),
            seen=0 if seen is None else seen.shape[1]))
        return replace(placed, optional=self.optional)


DOUBLE_SINGLE = ("double_blocks", "single_blocks")
FAMILIES = {f"comfy.ldm.{name}": family for name, family in {
    "modules.diffusionmodules.mmdit.MMDiT": JointFamily(("joint_blocks",), wraps=False, together=without_positions),
    "flux.model.Flux": JointFamily(DOUBLE_SINGLE, positions=(3, "pe"), together=with_ids),
    "chroma.model.Chroma": JointFamily(DOUBLE_SINGLE, together=with_ids),
    "chroma_radiance.model.ChromaRadiance": JointFamily(DOUBLE_SINGLE, together=with_ids),
    "qwen_image.model.QwenImageTransformer2DModel": JointFamily(("transformer_blocks",), together=with_ids),
    "krea2.model.SingleStreamDiT": JointFamily(("blocks",), optional=True, together=with_ids_and_fusion),
    "lumina.model.NextDiT": JointFamily(
        ("layers",), with_padding, positions=(2, "freqs_cis"), together=with_refiners),
    "hidream.model.HiDreamImageTransformer2DModel": JointFamily(
        ("double_stream_blocks", "single_stream_blocks"), with_two_texts, lay=lay_twice),
    "omnigen.omnigen2.OmniGen2Transformer2DModel": JointFamily(
        ("layers",), picture_last, wraps=False, positions=(2, "image_rotary_emb"), together=with_own_embedder),
    "boogu.model.BooguTransformer2DModel": JointFamily(
        ("double_stream_layers", "single_stream_layers"), picture_last, wraps=False, positions=(2, "rotary_emb")),
    "aura.mmdit.MMDiT": JointFamily(("double_layers", "single_layers"), after_registers, together=with_registers),
    "hunyuan_video.model.HunyuanVideo": JointFamily(DOUBLE_SINGLE, with_quotes, lay=lay_quotes),
    "ideogram4.model.Ideogram4Transformer2DModel": JointFamily(("layers",), side=1),
    "lens.model.LensTransformer2DModel": JointFamily(("transformer_blocks",), picture_first, side=1),
    "mage_flow.model.MageFlowTransformer2DModel": JointFamily(("transformer_blocks",)),
}.items()}


def find_joint(model: Any) -> JointFamily | None:
    """What a BaseModel's network offers, if it is of this kind and known here."""
    return find_joint_network(find_network(model))


def find_joint_network(network: Any) -> JointFamily | None:
    """As `find_joint`, of a network."""
    return next((family for kind, family in FAMILIES.items() if is_kind(network, kind)), None)


def pads_in_front(model: Any) -> bool:
    """Where a model makes a text longer than its conditioning's: in front of it, else behind."""
    return is_kind(model, "comfy.model_base.Flux2")


def pad_text(model: Any, text: Any) -> tuple[Any, int]:
    """A text [B, tokens, width] as long as a model hands it to its network, and the tokens put in front."""
    more = max(0, LONG_TEXT - text.shape[1]) if pads_in_front(model) else 0
    return torch.nn.functional.pad(text, (0, 0, more, 0)), more


def count_tokens(latent: Any, side: int) -> tuple[int, int, int]:
    """Frames of a latent [B, C, (T,) H, W], and tokens of `side` cells down and across, the last ones padded."""
    height, width = latent.shape[-2:]
    return latent.shape[2] if latent.ndim == 5 else 1, -(-height // side), -(-width // side)


def count_picture_tokens(latents: Sequence[Any], side: int) -> int:
    """Tokens of several latents together."""
    return sum(math.prod(count_tokens(latent, side)) for latent in latents)
