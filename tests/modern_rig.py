"""Attention of the modern families written out in float64, text and picture placed as they were measured."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import tiny
import torch
from families import FAMILIES, MODERN, PECULIAR
from injection_rig import source_arguments
from mixology.host.networks import OVERRIDE
from torch import Tensor

SECOND = 9  # tokens of HiDream's second text


@dataclass(frozen=True)
class Places:
    """Of one joint attention: all tokens, where the text and what reads it scaled stand, and the picture alone."""

    total: int
    text: tuple[int, int]
    readers: tuple[int, int]
    picture: tuple[int, int]


def text_first(text: int, picture: int, references: int = 0) -> Places:
    total = text + picture + references
    return Places(total, (0, text), (text, total), (text, text + picture))


def padded(text: int, picture: int) -> Places:
    first, rest = (-(-tokens // 32) * 32 for tokens in (text, picture))
    return Places(first + rest, (0, text), (first, first + picture), (first, first + picture))


def registers_first(text: int, picture: int) -> Places:
    total = 8 + text + picture
    return Places(total, (8, 8 + text), (8 + text, total), (8 + text, total))


def picture_first(text: int, picture: int) -> Places:
    return Places(text + picture, (picture, picture + text), (0, picture), (0, picture))


def two_texts(text: int, picture: int) -> Places:
    return picture_first(text + 2 * SECOND, picture)


ORDERS: dict[str, Callable[[int, int], Places]] = {
    **dict.fromkeys(("flux_schnell", "flux_fill", "longcat", "chroma", "chroma_radiance", "krea2", "qwen_layered",
                     "hunyuan_image", "hunyuan_video", "ideogram4", "mage_flow", "lumina2", "omnigen2", "boogu"),
                    text_first),
    "flux_kontext": lambda text, picture: text_first(text, picture, 12),
    "klein_edit": lambda text, picture: text_first(text, picture, 12),
    "qwen_edit": lambda text, picture: text_first(text, picture, 12),
    "z_image": padded, "z_image_pixel": padded, "auraflow": registers_first, "lens": picture_first,
    "hidream": two_texts,
}
CROSS = {"anima": 512, "cosmos_predict2": 11, "wan21_t2v": 11, "wan21_i2v": 11, "wan22_5b": 11, "ltxv": 11}
KNOWN = {**FAMILIES, **PECULIAR, **MODERN}


def read_tokens(name: str) -> int:
    """Tokens of a usual text as the network reads it."""
    return 512 if name == "klein_edit" else KNOWN[name].tokens


def words_of(name: str) -> int:
    """Tokens that carry factors: Anima's are those of its second text, HiDream's of both."""
    family = KNOWN[name]
    return {"anima": 7, "hidream": family.tokens + SECOND}.get(name, family.tokens)


def with_override(model: Any, override: Any) -> Any:
    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, change: Callable[[Tensor], None],
           **kwargs: Any) -> Tensor:
    """Softmax in float64; `change` writes to the maps [rows, heads, queries, keys]."""
    if not kwargs.get("skip_reshape", False):
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q.double() @ k.double().transpose(-1, -2) * kwargs.get("scale", q.shape[-1] ** -0.5)
    if mask is not None:
        mask = mask if mask.ndim == 4 else mask.reshape(-1, 1, *mask.shape[-2:])
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    maps = logits.softmax(-1)
    change(maps)
    out = maps @ v.double()
    if not kwargs.get("skip_output_reshape", False):
        out = out.transpose(1, 2).reshape(len(q), q.shape[2], -1)
    return out.to(torch.float32)


def scaled_by_hand(name: str, table: Mapping[int, Tensor], seen: set[int] | None = None) -> Any:
    """An override that multiplies columns of text where the picture reads it.

    Args:
        table: factors [1 or batch, words] by the index of a conditioning in the guider's list; seen: collects lengths.
    """
    family = KNOWN[name]
    picture = family.image_tokens(*family.size)

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *args: Any,
                 **kwargs: Any) -> Tensor:
        axis = 2 if kwargs.get("skip_reshape", False) else 1
        queries, keys = q.shape[axis], k.shape[axis]
        chunks = kwargs["transformer_options"]["cond_or_uncond"]

        def change(maps: Tensor) -> None:
            share = len(maps) // len(chunks)
            for chunk, index in enumerate(chunks):
                if index in table:
                    rows = maps[chunk * share:(chunk + 1) * share]
                    scale_maps(name, rows, table[index].double(), queries=queries, keys=keys, picture=picture)

        if seen is not None:
            seen.add(keys)
        return attend(q, k, v, heads, mask, change, **kwargs)

    return override


def scale_maps(name: str, maps: Tensor, factors: Tensor, queries: int, keys: int, picture: int) -> None:
    """Writes factors into the maps of a joint or cross-attention; leaves those of refiners and pictures alone."""
    if name in CROSS:
        if queries == picture and keys == CROSS[name] and keys != queries:
            maps[..., :factors.shape[1]] *= factors[:, None, None]
        return
    text = read_tokens(name)
    if name == "klein_edit":  # the model puts tokens in front
        factors = torch.nn.functional.pad(factors, (text - factors.shape[1], 0), value=1.0)
    places = ORDERS[name](text, picture)
    if queries == keys == places.total:
        if name == "hidream":
            factors = torch.cat([factors, factors[:, text:]], dim=1)
        maps[:, :, slice(*places.readers), slice(*places.text)] *= factors[:, None, None]


def sample(name: str, model: Any, positive: list[Any], negative: list[Any], batch: int = 2) -> Tensor:
    """Two steps of euler at cfg 3."""
    family = KNOWN[name]
    latent = family.latent(batch, *family.size)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"),
                             tiny.sigmas_of(model, "simple", 2), disable_pbar=True, seed=0)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


# --------------------------------------------------------------------------------------------------- injection

BLOCKS = {"krea2": 3, "lumina2": 3, "z_image": 3, "z_image_pixel": 3, "qwen_layered": 3, "qwen_edit": 3, "omnigen2": 2,
          "ideogram4": 2, "lens": 2, "mage_flow": 2, "boogu": 3, **dict.fromkeys(CROSS, 2)}  # joint attentions; else 4
Kept = dict[tuple[int, int], Tensor]  # queries (0) and keys (1) of a joint attention


def exchanged_by_hand(name: str, kept: Kept, text: int, replace: bool) -> Any:
    """An override that keeps queries and keys of the picture in the later half of the joint attentions, or lays those
    that were kept over a call's rows.

    Args:
        text: tokens of the call's text, as the network reads them.
    """
    family = KNOWN[name]
    tokens = family.image_tokens(*family.size)
    places = Places(tokens, (0, 0), (0, tokens), (0, tokens)) if name in CROSS else ORDERS[name](text, tokens)
    blocks, index = BLOCKS.get(name, 4), -1

    def override(func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal index
        axis = 2 if kwargs.get("skip_reshape", False) else 1
        if q.shape[axis] == k.shape[axis] == places.total:
            index += 1
            if index >= (blocks + 1) // 2:
                pair = [q, k]
                for part, tensor in enumerate(pair):
                    span = (slice(None),) * axis + (slice(*places.picture),)
                    if replace:
                        pair[part] = tensor.clone()
                        pair[part][span] = kept[index, part].repeat(len(q), *[1] * (q.ndim - 1))
                    else:
                        kept[index, part] = tensor[span].clone()
                q, k = pair
        return func(q, k, *args, **kwargs)

    return override


def injecting_by_hand(name: str, model: Any, trajectory: Any, source: Any, text: int) -> Any:
    """A clone that reads the source (one image, one prompt) before each call and lays it over all rows."""
    def wrapper(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        x, sigma, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
        options, kept = c.pop("transformer_options"), {}
        state = trajectory.state_at(float(sigma[0]), x[:1])
        own = {key: value for key, value in source_arguments(model.model, source, 1, state).items()
               if value is not None}
        apply_model(state, sigma[:1], **own, transformer_options={
            **options, OVERRIDE: exchanged_by_hand(name, kept, text, replace=False)})
        return apply_model(x, sigma, **c, transformer_options={
            **options, OVERRIDE: exchanged_by_hand(name, kept, read_tokens(name), replace=True)})

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone
