"""The rows and tokens of a model call: what a patch may rely on, said once."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..samplers.wording import format_picture

Attention = Callable[..., Tensor]
SAME = 0.9999  # cosine between a text and itself in half precision; other prompts stay below


def check_rows(rows: int, chunks: int, images: int, node: str) -> int:
    """Rows of one chunk: as many as the batch has images.

    The host lays a call's conditionings behind one another, each with all images. A node that tiles the picture may lay
    them out otherwise, and then nothing tells whose a row is.

    Args:
        rows: of the call; chunks: conditionings in it; images: of the batch that is sampled; node: for the message.

    Raises:
        ValueError: if the rows are not chunks x images.
    """
    if rows != chunks * images:
        raise ValueError(
            f"{node} expected a model call of {chunks} prompt(s) x {images} image(s), got {rows} row(s); set a tile "
            f"batch size of 1, or remove the node that changes the model's batch.")
    return images


def split_evenly(rows: int, parts: int, node: str) -> int:
    """Rows of each of the equal parts of a batch; raises ValueError, in the words of `node`, if they do not divide."""
    if rows % parts:
        raise ValueError(
            f"{node} expected a batch of {parts} equal parts, got {rows} rows; remove the node that changes the "
            f"model's batch.")
    return rows // parts


def check_part(seen: tuple[int, int], picture: tuple[int, int], area: tuple[int, ...] | None, node: str,
               cell: int | None = None) -> None:
    """Raises ValueError unless a call sees the whole picture, or the area of its conditioning.

    Args:
        seen: height and width of the call's latent; picture: those of the whole one.
        area: height, width, y and x of the conditioning's area, or None; cell: see `format_picture`, for the message.
    """
    expected = picture if area is None else (min(area[0], picture[0] - area[2]), min(area[1], picture[1] - area[3]))
    if tuple(seen) != tuple(expected):
        wanted, got = (format_picture((1, 1, *sides), cell) for sides in (expected, seen))
        raise ValueError(
            f"{node} expected the model to see {wanted} at once, got {got}; remove the node that hands the model parts "
            f"of the picture (tiles, windows).")


def token_axis(kwargs: dict[str, Any]) -> int:
    """Which axis of an attention's queries, keys and values counts tokens, by the keywords that the host calls it with.

    With `skip_reshape` heads are split already, [rows, heads, tokens, d]; else they are [rows, tokens, heads * d], in
    SD3 with values of [rows, tokens, heads, d].
    """
    return 2 if kwargs.get("skip_reshape", False) else 1


def chain_override(func: Attention, inner: Attention | None) -> Attention:
    """What an attention override of ours calls: the one that it found in the host's slot, else the host's own kernel.

    Args:
        func: the kernel; inner: `inner(func, q, k, v, heads, ...)`, or None.
    """
    return func if inner is None else lambda *args, **kwargs: inner(func, *args, **kwargs)


def make_region_watch(texts: Sequence[Tensor], rows: int, node: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """An `attn2_patch`, the last of its list, that refuses marked texts in rows that another node added.

    Nodes that couple prompts inside attention keep the text of a region and nothing else of its conditioning.

    Args:
        texts: [1, tokens, width] each, of marks that no row of the call has.
        rows: batch size of the call.
    """
    looked = False

    def watch(n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
              ) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal looked
        if len(context) != rows and not looked:
            looked = True  # every layer reads the same texts
            if any(holds_text(context, text) for text in texts):
                raise ValueError(
                    f"{node} expected its prompt as a prompt of the sampler, got it as a region of a node that couples "
                    f"prompts inside attention, where it has no effect; use Cross-Attention Merge for the regions.")
        return n, context, value

    return watch


def holds_text(context: Tensor, text: Tensor) -> bool:
    """Whether a row of [B, tokens, width] begins with one of the texts [N, tokens, width], at any strength."""
    tokens, width = text.shape[1:]
    if context.shape[1] < tokens or context.shape[2] != width:
        return False
    read, own = (torch.nn.functional.normalize(rearrange(part, "b tokens width -> b (tokens width)").float(), dim=1)
                 for part in (context[:, :tokens], text.to(context.device)))
    return bool((read @ own.T > SAME).any())
