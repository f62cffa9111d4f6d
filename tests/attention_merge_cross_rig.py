"""Cross-attention merge written out on the modules of transformers that read text through cross-attention."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.samplers
import tiny
import torch
from attention_merge_rig import cell_means
from families import MODERN
from families_modern import WAN, cross
from family import draw
from torch import Tensor

SEED = 5
Part = Callable[[Any, Tensor, Tensor, Any], Tensor]


class Picture:
    """What a clip vision encoder hands to Wan's image to video."""

    penultimate_hidden_states = draw(1, 257, 1280, seed=21)


WITH_PICTURE = "wan21_i2v with picture"
NAMES = ["anima", "cosmos_predict2", "wan21_t2v", "wan21_i2v", WITH_PICTURE, "wan22_5b", "wan21_vace", "wan21_camera",
         "ltxv"]
BESIDE = {  # of Wan's kin
    "wan21_vace": cross("WAN21_Vace", 16, {
        **WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}, video=True, frames=2, size=(10, 6)),
    "wan21_camera": cross("WAN21_Camera", 16, {**WAN, "model_type": "camera", "in_dim": 32}, video=True, frames=2),
}


def family_of(name: str) -> Any:
    return {**MODERN, **BESIDE}[name.split()[0]]


def conditioning(name: str, seed: int, tokens: int = 11, **options: Any) -> list[Any]:
    """A text of the family; Anima's second, by which its words are known, as long as the first."""
    if name == WITH_PICTURE:
        options["clip_vision_output"] = Picture()
    if name == "anima":
        generator = torch.Generator().manual_seed(seed)
        options["t5xxl_ids"] = torch.randint(1, 32000, (tokens,), generator=generator, dtype=torch.int)
        options["t5xxl_weights"] = 1 + 0.1 * torch.rand(tokens, generator=generator)
    if name == "ltxv":  # the last words are hidden
        options["attention_mask"] = torch.tensor([[1] * (tokens - 2) + [0] * 2])
    return family_of(name).conditioning(seed, tokens, **options)


def contexts_of(network: Any, text: list[Any]) -> Tensor:
    """A conditioning's text as the network's layers read it."""
    tensor, options = text[0]
    if hasattr(network, "text_embedding"):
        return network.text_embedding(tensor)
    if hasattr(network, "caption_projection"):
        return network.caption_projection(tensor)
    if hasattr(network, "preprocess_text_embeds"):
        ids, weights = options["t5xxl_ids"], options["t5xxl_weights"]
        ids = ids.expand(len(tensor), -1)
        return network.preprocess_text_embeds(tensor, ids, t5xxl_weights=weights[None, :, None])
    return tensor


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt d) V of every head, [rows, tokens, heads * d], in float64."""
    q, k, v = (part.double().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(~hidden.bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def read_text(module: Any, x: Tensor, context: Tensor, factors: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Attention to one text before the output projection."""
    scale: Any = 1 if factors is None else factors.unsqueeze(-1)
    if hasattr(module, "q_proj"):
        q, k = (norm(proj(part).unflatten(-1, (module.n_heads, -1))).flatten(2) for norm, proj, part in (
            (module.q_norm, module.q_proj, x), (module.k_norm, module.k_proj, context)))
        return attend(q, k, module.v_proj(context) * scale, module.n_heads)
    if hasattr(module, "to_q"):
        q, k = module.q_norm(module.to_q(x)), module.k_norm(module.to_k(context))
        return attend(q, k, module.to_v(context) * scale, module.heads, hidden)
    q, k = module.norm_q(module.q(x)), module.norm_k(module.k(context))
    out = attend(q, k, module.v(context) * scale, module.num_heads)
    if hasattr(module, "k_img"):
        given = getattr(module, "shown", context)
        k, v = module.norm_k_img(module.k_img(given)), module.v_img(given)
        out = out + attend(q, k, v if given is not context else v * scale, module.num_heads)
    return out


def project(module: Any, out: Tensor) -> Tensor:
    for name in ("output_proj", "to_out", "o"):
        if hasattr(module, name):
            return getattr(module, name)(out)
    raise AssertionError


@contextmanager
def merged_explicitly(model: Any, texts: Sequence[list[Any]], weights: Tensor | Callable[[dict[str, Any]], Tensor], *,
                      place: int = 0, factors: Sequence[Tensor | None] = ()) -> Iterator[list[int]]:
    """Text attention of the guider's list number `place` as the weighted sum over `texts`.

    Args:
        weights: [styles, tokens], summing to 1, or a function of the call's options; only calls with so many tokens
            are merged.
        factors: of each text's values, [1, tokens].

    Yields:
        a list that grows by the number of merged rows of each layer.
    """
    network = model.model.diffusion_model
    contexts = [contexts_of(network, text) for text in texts]
    hidden = [text[0][1].get("attention_mask") for text in texts]
    scales = [*factors, *[None] * (len(texts) - len(factors))]
    seen: list[int] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, options = args[0], kwargs["transformer_options"]
        chunks = options["cond_or_uncond"]
        share = len(x) // len(chunks)
        shown = weights(options) if callable(weights) else weights
        if x.shape[1] != shown.shape[1]:
            return output
        output = output.clone()
        for chunk, index in enumerate(chunks):
            if index != place:
                continue
            rows = slice(chunk * share, (chunk + 1) * share)
            pictures = kwargs.get("context_img_len")
            if pictures:
                module.shown = args[1][rows, :pictures] if len(args) > 1 else kwargs["context"][rows, :pictures]
            parts = [weight[None, :, None].double() * read_text(
                module, x[rows], context.expand(share, -1, -1), scale, mask)
                for weight, context, scale, mask in zip(shown, contexts, scales, hidden)]
            if pictures:
                del module.shown
            output[rows] = project(module, sum(parts[1:], parts[0]).to(x))
            seen.append(share)
        return output

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if name.split(".")[0].endswith("blocks") and name.endswith((".cross_attn", ".attn2")):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield seen


def spread(name: str, masks: Tensor, frames: int | None = None, area: Any = None) -> Tensor:
    """Masks [styles, H, W] at the tokens of each frame, [styles, tokens].

    Args:
        area: height, width, y and x of the latent's part that a call sees.
    """
    family = family_of(name)
    side, cells = 1 if name == "ltxv" else 2, cell_means(masks, *family.size)
    height, width, top, left = area or (*family.size, 0, 0)
    cells = cells[:, top:top + height, left:left + width]
    rows, columns = -(-height // side), -(-width // side)
    # the last tokens reach beyond the edge
    cells = torch.nn.functional.pad(cells, (0, columns * side - width, 0, rows * side - height), mode="replicate")
    tokens = cell_means(cells, rows, columns).flatten(1)
    return tokens.repeat(1, frames or family.frames)


def sample(model: Any, name: str, positive: list[Any], negative: list[Any], batch: int = 2, *,
           latent: Tensor | None = None, noise: Tensor | None = None, sigmas: Tensor | None = None) -> Tensor:
    start: Tensor = family_of(name).latent(batch, *family_of(name).size) if latent is None else latent
    if noise is None:
        noise = draw(*start.shape, seed=SEED)
    guider = tiny.cfg_guider(model, positive, negative)
    sigmas = tiny.sigmas_of(model, "simple", 2) if sigmas is None else sigmas
    return guider.sample(noise, start, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=SEED)


def error(ours: Tensor, expected: Tensor) -> float:
    """The largest difference over the deviation of what was expected."""
    return float((ours - expected).abs().max() / expected.std())
