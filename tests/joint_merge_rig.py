"""Cross-attention merge on joint attention written out by the tests: one plain call of the network for each style.

The calls run side by side, each with its own text alone, and stop at every attention, where what the picture's tokens
get is blended in float64. Nothing of the pack is involved: no text stands beside another.
"""
from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from attention_merge_rig import cell_means
from comfy.patcher_extension import WrappersMP
from families import FAMILIES, PECULIAR
from families_modern import MODERN
from torch import Tensor

ALL = {**FAMILIES, **PECULIAR, **MODERN}


@dataclass
class Styles:
    """What the rows of the first prompt read, as the tests understand it.

    Attributes:
        texts: [1 or images, tokens, width]; masks: [N, H, W], summing to 1.
        factors: of each text's values as the picture reads them, [1 or images, tokens], or None.
        patch: side of a picture token; references: tokens of reference pictures.
        multiple: to which text and picture are padded by learned tokens; lead: learned tokens in front of the text.
        picture_last: behind the references.
        area: height, width, y, x of the part of the latent that is seen; picture: the latent's height and width.
    """

    texts: Sequence[Tensor]
    masks: Tensor
    factors: Sequence[Tensor | None] | None = None
    patch: int = 2
    references: int = 0
    multiple: int = 1
    lead: int = 0
    picture_last: bool = False
    area: tuple[int, int, int, int] | None = None
    picture: tuple[int, int] | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """softmax(Q K^T / sqrt d) V in float64, [rows, tokens, heads * d]."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.double().reshape(len(mask), -1, *mask.shape[-2:])
    return (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)


class Lockstep:
    """Calls of the network that share the picture's part of every attention."""

    def __init__(self, styles: Styles, x: Tensor):
        self.styles, self.count = styles, len(styles.texts)
        self.barrier = threading.Barrier(self.count)
        self.parts: list[Any] = [None] * self.count
        height, width = x.shape[-2:]
        self.frames = x.shape[2] if x.ndim == 5 else 1
        whole = styles.picture or (height, width)
        weights = cell_means(styles.masks, *whole)
        if styles.area is not None:
            h, w, top, left = styles.area
            weights = weights[:, top:top + h, left:left + w]
        down, across = -(-height // styles.patch), -(-width // styles.patch)
        weights = torch.nn.functional.pad(
            weights, (0, across * styles.patch - width, 0, down * styles.patch - height), mode="replicate")
        weights = weights.unflatten(2, (across, -1)).unflatten(1, (down, -1)).mean((2, 4)).flatten(1)
        own = weights.repeat(1, self.frames)
        others = own.mean(1, keepdim=True).expand(-1, styles.references)
        self.tokens = own.shape[1]
        self.weights = torch.cat([others, own] if styles.picture_last else [own, others], dim=1)

    def find_picture(self, tokens: int, text: int) -> slice | None:
        """Where the pictures stand in an attention among so many tokens; None for one without text and padding."""
        count, multiple = self.weights.shape[1], self.styles.multiple
        padded = self.styles.lead + text + -text % multiple
        whole = count + -count % multiple
        if tokens == padded + whole:
            return slice(padded, padded + count)
        return slice(0, count) if multiple > 1 and tokens == whole != count else None

    def override(self, style: int) -> Any:
        text = self.styles.texts[style].shape[1]
        factors = self.styles.factors[style] if self.styles.factors else None

        def attend_here(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            axis = 2 if kwargs.get("skip_reshape") else 1
            picture = self.find_picture(k.shape[axis], text)
            mask = args[0] if args else kwargs.get("mask")
            out = attend(q, k, v, heads, mask, kwargs)
            if picture is None:
                return out.to(q)
            read = out[:, picture]
            if factors is not None and picture.start:
                weights = torch.ones(len(factors), v.shape[axis])
                weights[:, self.styles.lead:self.styles.lead + text] = factors
                weights = weights.reshape(len(factors), *[1] * (axis - 1), -1, *[1] * (v.ndim - 1 - axis))
                read = attend(q, k, v.double() * weights, heads, mask, kwargs)[:, picture]
            self.parts[style] = read
            self.barrier.wait()
            merged = sum(weight.reshape(1, -1, 1) * part for weight, part in zip(self.weights, self.parts))
            self.barrier.wait()
            out[:, picture] = merged
            return out.to(q)

        return attend_here


def expect(name: str, masks: Tensor, *conditionings: Any, **more: Any) -> Styles:
    """What rows of a family read whose prompts are these."""
    family = ALL[name]
    texts = [part[0][0] for part in conditionings]
    if family.kind == "Flux2" or name in ("flux2", "klein"):
        texts = [torch.nn.functional.pad(text, (0, 0, max(0, 512 - text.shape[1]), 0)) for text in texts]
    latents = conditionings[0][0][1].get("reference_latents") or []
    tokens = sum(-(-part.shape[-2] // family.patch) * -(-part.shape[-1] // family.patch) for part in latents)
    return Styles(texts, masks, patch=family.patch, references=0 if name == "krea2" else tokens,
                  multiple=32 if name.startswith("z_image") else 1, lead=8 if name == "auraflow" else 0,
                  picture_last=name == "omnigen2", **more)


def rows_of(value: Any, rows: slice, batch: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value[rows]
    return [rows_of(part, rows, batch) for part in value] if isinstance(value, list) else value


def written_out(model: Any, *merged: Styles | None) -> Any:
    """A clone whose rows are merged as told: of the guider's first conditioning by the first of `merged`, and so on."""

    def apply(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
              transformer_options: Any = None, **kwargs: Any) -> Tensor:
        options = transformer_options or {}
        chunks = options["cond_or_uncond"]
        share, results = len(x) // len(chunks), []
        for chunk, place in enumerate(chunks):
            rows = slice(chunk * share, (chunk + 1) * share)
            own = {name: rows_of(value, rows, len(x)) for name, value in kwargs.items()}
            given = [rows_of(part, rows, len(x)) for part in (x, t, c_concat)]
            styles = merged[place] if place < len(merged) else None
            if styles is None or styles.area and styles.area[:2] != tuple(x.shape[-2:]):
                results.append(executor(*given, c_crossattn[rows], control, options, **own))
                continue
            lockstep, outputs = Lockstep(styles, x), [None] * len(styles.texts)

            def run(style: int, given: Any = given, own: Any = own, lockstep: Any = lockstep, outputs: Any = outputs,
                    ) -> None:
                try:
                    text = lockstep.styles.texts[style]
                    more = {**own, "num_tokens": text.shape[1]} if "num_tokens" in own else own
                    with torch.inference_mode():
                        outputs[style] = executor(
                            *given, text.expand(share, -1, -1), control,
                            {**options, "optimized_attention_override": lockstep.override(style)}, **more)
                except Exception:
                    lockstep.barrier.abort()
                    raise

            threads = [threading.Thread(target=run, args=(style,)) for style in range(len(styles.texts))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            results.append(outputs[0])
        return torch.cat(results)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "written_out", apply)
    return clone
