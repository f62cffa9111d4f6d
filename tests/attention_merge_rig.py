"""Cross-attention merge written out by the tests: hooks on the UNet's own modules, no patch of the host involved."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import tiny
import torch
from mixology.host.attention_merge import merge_conditionings
from torch import Tensor

SEED = 5


@dataclass
class Expected:
    """A merged conditioning as the tests understand it.

    Attributes:
        texts: [1 or images, tokens, width], the conditioning's own first.
        masks: [N, H, W], summing to 1.
        factors: of each text's values, [1 or images, tokens], as a function of sigma; None where nothing is scaled.
        area: height, width, y, x of the part of the latent it paints.
        picture: the latent's height and width, needed with an area.
    """

    texts: Sequence[Tensor]
    masks: Tensor
    factors: Sequence[Callable[[float], Tensor | None] | None] | None = None
    area: tuple[int, int, int, int] | None = None
    picture: tuple[int, int] | None = None


def cell_means(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks [N, H, W] averaged over the area of each of height x width cells, in float64."""
    rows, columns = masks.shape[1:]
    fine = masks.double().repeat_interleave(height, 1).repeat_interleave(width, 2)
    return fine.reshape(len(masks), height, rows, width, columns).mean((2, 4))


def attend(module: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt d) V of every head, before `to_out`, in float64."""
    q, k, v = (part.double().unflatten(-1, (module.heads, -1)).transpose(1, 2)
               for part in (module.to_q(x), module.to_k(keys), module.to_v(values)))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@contextmanager
def merge_explicitly(model: Any, *expected: Expected, index: int | None = None,
                     of_shape: tuple[int, int] | None = None) -> Iterator[list[int]]:
    """Every cross-attention of the model reads `expected` where its rows read the first text of one.

    Args:
        index: only in this place of the guider's list.
        of_shape: only in calls of this height and width.

    Yields:
        a list that grows by the number of merged rows of each attention.
    """
    seen: list[int] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, context, options = args[0], kwargs["context"], kwargs["transformer_options"]
        value = kwargs["value"] if kwargs["value"] is not None else context
        share = len(x) // len(options["cond_or_uncond"])
        if of_shape not in (None, tuple(options["original_shape"][-2:])):
            return output
        output = output.clone()
        for chunk, place in enumerate(options["cond_or_uncond"]):
            rows = slice(chunk * share, (chunk + 1) * share)
            for merge in expected:
                own = merge.texts[0].shape[1]
                if index in (None, place) and bool((context[rows, :own] == merge.texts[0]).all()):
                    merged = merge_rows(module, x[rows], context[rows], value[rows], options, merge)
                    output[rows] = module.to_out(merged.to(x))
                    seen.append(share)
        return output

    with ExitStack() as stack:
        for name, module in model.model.diffusion_model.named_modules():
            first = name.endswith("attn1") and module.to_k.in_features != module.to_q.in_features  # reads text as well
            if name.endswith("attn2") or first:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield seen


def merge_rows(module: Any, x: Tensor, context: Tensor, value: Tensor, options: dict[str, Any], merge: Expected,
               ) -> Tensor:
    sigma = float(options["sigmas"][0])
    weights = cell_means(merge.masks, *(merge.picture or options["original_shape"][-2:]))
    if merge.area is not None:
        height, width, top, left = merge.area
        weights = weights[:, top:top + height, left:left + width]
    weights = cell_means(weights, *options["activations_shape"][-2:]).flatten(1)
    out = torch.zeros((), dtype=torch.float64)
    for i, (text, weight) in enumerate(zip(merge.texts, weights)):
        keys, values = (context, value) if i == 0 else [text.to(x).expand(len(x), -1, -1)] * 2
        make = merge.factors[i] if merge.factors else None
        factors = make(sigma) if make else None
        if factors is not None:
            values = values * factors.repeat(1, values.shape[1] // factors.shape[1]).to(x).unsqueeze(-1)
        out = out + weight.reshape(1, -1, 1) * attend(module, x, keys, values)
    return out


def merge(model: Any, masks: Tensor, *conditionings: Any) -> tuple[Any, list[Any]]:
    return merge_conditionings(model, masks, {f"conditioning_{i}": part for i, part in enumerate(conditionings)})


def texts_of(*conditionings: Any) -> list[Tensor]:
    return [part[0][0] for part in conditionings]


def soft_masks(count: int, height: int = 24, width: int = 20, seed: int = 3) -> Tensor:
    """Random masks that sum to 1 and change from pixel to pixel."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(count, height, width, generator=generator)).softmax(dim=0)


def sample(guider: Any, batch: int = 1, height: int = 8, width: int = 6, steps: int = 3, sampler: Any = None) -> Tensor:
    return sample_latent(guider, tiny.latent(batch, height, width)["samples"], steps, sampler)


def sample_latent(guider: Any, latent: Tensor, steps: int = 3, sampler: Any = None) -> Tensor:
    noise = comfy.sample.prepare_noise(latent, SEED)
    return guider.sample(noise, latent, sampler or comfy.samplers.sampler_object("euler"),
                         tiny.sigmas_of(guider.model_patcher, steps=steps), disable_pbar=True, seed=SEED)
