"""Attention written out for any family, by where its tokens stand; nothing of the pack is involved."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import tiny
import torch
from family import Family
from mixology.host.networks import OVERRIDE
from torch import Tensor

Override = Callable[..., Tensor]
Spans = dict[str, tuple[int, int]]  # first token and number of tokens of a part


def fill_up(tokens: int, multiple: int) -> int:
    return math.ceil(tokens / multiple) * multiple


def find_spans(family: Family, tokens: int) -> tuple[Spans, int]:
    """Where a joint family's parts stand for a text of so many tokens, and how many tokens there are in all."""
    counts = {"text": tokens, "picture": family.image_tokens(*family.size), "registers": family.registers,
              "llama": family.llama, "references": family.reference_tokens()}
    spans: Spans = {}
    place = 0
    for part in family.order.split():
        own = counts[part]
        place += max(0, family.least - own) if part == "text" else 0
        spans[part] = place, own
        place += fill_up(own, family.multiple)
    return spans, place


def text_length(family: Family, tokens: int) -> int:
    """Keys of the text's own attention in a family without a joint one."""
    return max(family.least, family.words or tokens)


def with_override(model: Any, override: Override) -> Any:
    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def split_heads(tensor: Tensor, heads: int, split: bool) -> Tensor:
    """[rows, heads, tokens, width] in float64."""
    return (tensor if split else tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)).double()


def write_out(q: Tensor, k: Tensor, heads: int, mask: Tensor | None, split: bool) -> Tensor:
    """The attention maps, [rows, heads, queries, keys] in float64."""
    q, k = split_heads(q, heads, split), split_heads(k, heads, split)
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape) if mask.ndim < 3 else (
            mask.unsqueeze(1) if mask.ndim == 3 else mask)
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1)


def scale_columns(family: Family, factors: Mapping[int, Tensor], tokens: int) -> Override:
    """An override that multiplies the columns of words in float64 maps, for what belongs to pictures.

    Args:
        factors: [1 or images, words] by the index of a conditioning in the guider's list; tokens: of all texts.
    """
    spans, total = find_spans(family, tokens)
    first = spans["text"][0] if family.joint else 0
    length = total if family.joint else text_length(family, tokens)

    def attend(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *args: Any,
               **kwargs: Any) -> Tensor:
        split = kwargs.get("skip_reshape", False)
        maps = write_out(q, k, heads, mask, split)
        queries, keys = maps.shape[-2:]
        repeats = keys // length if family.unet else 1  # a UNet's texts are repeated to one length
        if keys == length * repeats and (family.joint or keys != queries):
            marks = kwargs["transformer_options"]["cond_or_uncond"]
            rows = maps.unflatten(0, (len(marks), -1))
            for chunk, index in enumerate(marks):
                if index in factors:
                    own = factors[index].double()[:, None, None, :]
                    for start, count in pictures(family, spans) if family.joint else [(0, queries)]:
                        for copy in range(repeats):
                            place = first + copy * length
                            rows[chunk, :, :, start:start + count, place:place + own.shape[-1]] *= own
            maps = rows.flatten(0, 1)
        v = split_heads(v, heads, split)
        out = (maps @ v.repeat_interleave(maps.shape[1] // v.shape[1], 1)).to(q.dtype)
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    return attend


def pictures(family: Family, spans: Spans) -> list[tuple[int, int]]:
    """What reads the words: the picture and its references."""
    return [spans[part] for part in ("picture", "references") if part in spans]


def main_call(family: Family, tokens: int) -> Callable[[int, int], int | None]:
    """A function of a call's queries and keys that gives the picture's first token in it, None in other calls."""
    picture = family.image_tokens(*family.size)
    places = {picture: 0}
    if family.joint:
        spans, total = find_spans(family, tokens)
        places = {total: spans["picture"][0]}

    def find(queries: int, keys: int) -> int | None:
        return places.get(keys) if queries == keys else None

    return find


def count_main_calls(family: Family, model: Any, conditioning: list[Any]) -> int:
    """How many attentions a call of the network makes among text and picture, or among the picture's tokens."""
    seen: list[int] = []
    find = main_call(family, conditioning[0][0].shape[1])

    def note(func: Any, q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        axis = 2 if kwargs.get("skip_reshape") else 1
        seen.append(find(q.shape[axis], k.shape[axis]) is not None)
        return func(q, k, *rest, **kwargs)

    read_once(with_override(model, note), conditioning, family.latent(1, *family.size))
    return sum(seen)


def read_once(model: Any, conditioning: list[Any], x: Tensor) -> Tensor:
    """What the model says of x at the middle of a short grid."""
    def once(model_k: Any, state: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        return model_k(x, sigmas[1:2].expand(len(x)), **extra_args)

    zeros = torch.zeros_like(x)
    return tiny.cfg_guider(model, conditioning, conditioning, 1.0).sample(
        zeros, zeros, comfy.samplers.KSAMPLER(once), tiny.sigmas_of(model, "simple", 2), disable_pbar=True, seed=0)


def exchange(find: Callable[[int, int], int | None], calls: int, weight: Tensor) -> Callable[..., Override]:
    """How an override keeps or replaces queries and keys of the picture in the later half of `calls`.

    Args:
        weight: of the source at each token of the picture.
    """
    def make_override(kept: dict[Any, Tensor], replace: bool, images: int) -> Override:
        index = -1

        def attend(func: Any, q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
            nonlocal index
            axis = 2 if kwargs.get("skip_reshape") else 1
            first = find(q.shape[axis], k.shape[axis])
            index += first is not None
            if first is None or index < (calls + 1) // 2:
                return func(q, k, *rest, **kwargs)
            parts = {}
            for name, whole in (("q", q), ("k", k)):
                rows = whole.narrow(axis, first, len(weight))
                if replace:
                    source = kept[index, name].repeat(len(whole) // images, *[1] * (whole.ndim - 1))
                    own = weight[:, None]
                    whole = whole.clone()
                    whole.narrow(axis, first, len(weight)).copy_(own * source + (1 - own) * rows)
                else:
                    kept[index, name] = rows.clone()
                parts[name] = whole
            return func(parts["q"], parts["k"], *rest, **kwargs)

        return attend

    return make_override
