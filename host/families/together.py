"""How the texts of several prompts stand in one call of a network: what each reads as its own positions and padding.

Every text keeps its distance to the picture. The ids of the first text and of the picture are those that the network
gives them without the others, so that rows of other conditionings are what they were.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention_patches.sequence import TokenSequence
from ...attention_patches.together import NOWHERE, SharedSequence, place_texts, span_each
from ..networks import find_network, is_kind


@dataclass(frozen=True)
class Stage:
    """Attention of some blocks, and where the tokens of all texts stand in it."""

    blocks: Sequence[Any]
    sequence: SharedSequence


@dataclass(frozen=True)
class Layout:
    """What a network is asked to hold.

    Attributes:
        alone: where tokens stand in a call with the first text alone; lengths: tokens of every text.
        blocks: the network's blocks that attend among text and picture; options: the call's `transformer_options`.
    """

    alone: TokenSequence
    lengths: Sequence[int]
    blocks: Sequence[Any]
    options: Mapping[str, Any]

    def place(self) -> SharedSequence:
        """One text after another, then what follows the first alone."""
        alone = self.alone
        return place_texts(self.lengths, alone.pictures, alone.picture, frames=alone.frames,
                           references=alone.references if alone.optional else 0)

    def place_words(self) -> SharedSequence:
        """The texts without a picture."""
        return place_texts(self.lengths, (self.lengths[0], 0), (self.lengths[0], 0))


Together = Callable[[Any, Layout, ExitStack], list[Stage]]  # of a BaseModel, for as long as the stack is open


def without_positions(model: Any, layout: Layout, stack: ExitStack) -> list[Stage]:
    """Text without positions (SD3).

    Raises:
        ValueError: for a network that mixes words of a text before its blocks.
    """
    if getattr(find_network(model), "context_processor", None) is not None:
        raise ValueError(
            "Cross-Attention Merge expected an SD3 model whose text goes straight to its blocks, got one that mixes "
            "its words before; use the Epsilon Merge Guider.")
    return [Stage(layout.blocks, layout.place())]


def with_ids(model: Any, layout: Layout, stack: ExitStack) -> list[Stage]:
    """Ids of text and picture come together to `pe_embedder`; those of a text count from its first token.

    The picture's are its own, or (LongCat) begin behind the first text, to whose end the others are moved. Older hosts
    let it begin at 512 there.
    """
    network = find_network(model)
    first, *_ = lengths = layout.lengths
    follows: Sequence[int] = []
    if is_kind(model, "comfy.model_base.LongCatImage") and layout.options["rope_options"]["shift_y"] == first:
        follows = network.params.txt_ids_dims

    def give_ids(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *rest = args
        texts = [shift_ids(ids[:, :tokens], first - tokens, follows) for tokens in lengths]
        return torch.cat([*texts, ids[:, sum(lengths):]], dim=1), *rest

    stack.callback(network.pe_embedder.register_forward_pre_hook(give_ids).remove)
    return [Stage(layout.blocks, layout.place())]


def with_ids_and_fusion(model: Any, layout: Layout, stack: ExitStack) -> list[Stage]:
    """As `with_ids`, after blocks in which the words of a text attend to each other (Krea 2)."""
    fused = Stage(find_network(model).txtfusion.refiner_blocks, layout.place_words())
    return [*with_ids(model, layout, stack), fused]


def with_refiners(model: Any, layout: Layout, stack: ExitStack) -> list[Stage]:
    """Lumina 2 and Z-Image: text and picture are refined apart, and may be padded by learned tokens that all read.

    The picture's padding stands at id 0, so that its distance to the picture is the text's: each text has its own.

    Raises:
        ValueError: for reference pictures.
    """
    network, alone = find_network(model), layout.alone
    if alone.references:
        raise ValueError(
            "Cross-Attention Merge expected no reference pictures on this model, got some; remove the node that adds "
            "them, or use the Epsilon Merge Guider.")
    multiple = network.pad_tokens_multiple or 1
    count, lengths = len(layout.lengths), [tokens + -tokens % multiple for tokens in layout.lengths]
    first, text, picture = lengths[0], sum(lengths), alone.picture[1]
    own = [-picture % multiple] * count
    tail = picture + sum(own)
    tail += -tail % multiple
    nowhere = (NOWHERE,) * count
    joint = SharedSequence(tuple(span_each(lengths, 0)), tuple(span_each(own, text + picture)), (text, picture),
                           picture=(text, picture), total=text + tail)
    words = SharedSequence(joint.before, nowhere, (text, 0), picture=(text, 0), total=text)
    noise = SharedSequence(nowhere, tuple(span_each(own, picture)), (0, picture), picture=(0, picture), total=tail)
    texts_next = [False]

    def pad_texts(module: Any, args: Any, output: Tensor) -> Tensor:
        texts_next[0] = True
        parts = zip(output.split(list(layout.lengths), dim=1), lengths)
        return torch.cat([append(part, tokens - part.shape[1], "cap_pad_token") for part, tokens in parts], dim=1)

    def pad_picture(module: Any, args: Any, output: Tensor) -> Tensor:
        return append(output, sum(own), "x_pad_token")

    def append(part: Tensor, tokens: int, name: str) -> Tensor:
        if not tokens:
            return part
        token = getattr(network, name).to(part, copy=True)
        return torch.cat([part, token.expand(len(part), tokens, -1)], dim=1)

    def give_ids(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *rest = args
        if texts_next[0]:
            texts_next[0] = False
            return torch.cat([shift_ids(ids[:, :tokens], first - tokens, [0]) for tokens in lengths], dim=1), *rest
        padding = ids.new_zeros(len(ids), tail - picture, ids.shape[2])
        for (place, tokens), length in zip(noise.after, lengths):
            padding[:, place - picture:place - picture + tokens, 0] = first - length
        return torch.cat([shift_ids(ids[:, :picture], first - text, [0]), padding], dim=1), *rest

    stack.callback(network.cap_embedder.register_forward_hook(pad_texts).remove)
    stack.callback(network.x_embedder.register_forward_hook(pad_picture).remove)
    stack.callback(network.rope_embedder.register_forward_pre_hook(give_ids).remove)
    return [Stage(layout.blocks, joint), Stage(network.context_refiner, words), Stage(network.noise_refiner, noise)]


def with_registers(model: Any, layout: Layout, stack: ExitStack) -> list[Stage]:
    """AuraFlow: learned tokens in front of the text are rewritten with it, so that each text has its own."""
    network, lengths = find_network(model), layout.lengths
    count = network.register_tokens.shape[1]

    def add_registers(module: Any, args: Any, output: Tensor) -> Tensor:
        first, *texts = output.split(list(lengths), dim=1)
        registers = network.register_tokens.to(output).expand(len(output), -1, -1)
        return torch.cat([first, *(part for text in texts for part in (registers, text))], dim=1)

    stack.callback(network.cond_seq_linear.register_forward_hook(add_registers).remove)
    whole = replace(layout, lengths=[count + tokens for tokens in lengths])
    return [Stage(layout.blocks, replace(whole.place(), lead=count))]


def with_own_embedder(model: Any, layout: Layout, stack: ExitStack) -> list[Stage]:
    """OmniGen2: the text is refined, and all ids are made in one place from the first text's length."""
    network, lengths = find_network(model), layout.lengths

    def give_ids(module: Any, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        _, references, picture, whole, *rest = output
        texts = [whole[:, :lengths[0]]]
        for tokens in lengths[1:]:
            ids = torch.arange(tokens, device=whole.device).reshape(1, -1, 1).repeat(1, 1, 3)
            ids = shift_ids(ids, lengths[0] - tokens, [0])  # the picture's ids follow the text on this axis only
            texts.append(module.rope_embedder(ids).movedim(1, 2).expand(len(whole), *[-1] * (whole.ndim - 1)))
        words = torch.cat(texts, dim=1)
        return words, references, picture, torch.cat([words, whole[:, lengths[0]:]], dim=1), *rest

    stack.callback(network.rope_embedder.register_forward_hook(give_ids).remove)
    return [Stage(layout.blocks, layout.place()), Stage(network.context_refiner, layout.place_words())]


def shift_ids(ids: Tensor, by: int, axes: Sequence[int]) -> Tensor:
    """Ids [B, tokens, axes] moved along some axes."""
    if not by or not axes:
        return ids
    moved = ids.clone()
    moved[..., list(axes)] += by
    return moved
