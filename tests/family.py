"""What a tiny model of a family is: how to build it, its latents and its texts."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from comfy import supported_models

WIDTH = 20  # of a text token
POOLED = 12  # of a pooled text


def raise_norms(patcher: Any) -> Any:
    """Norm weights around 1: around 0, where `fill` puts them, attention would be nearly uniform."""
    with torch.no_grad():
        for name, parameter in patcher.model.diffusion_model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter += 1.0
    return patcher


def build(kind: str, config: dict[str, Any], seed: int, extra: dict[str, Any] | None = None) -> Any:
    """A model of the host's class of that name in `supported_models`, at the width that `config` gives."""
    fields: dict[str, Any] = {"unet_config": {}} | ({} if extra is None else {"unet_extra_config": extra})
    tiny_config = type(f"Tiny{kind}", (getattr(supported_models, kind),), fields)
    return raise_norms(tiny.patcher_of(tiny_config(config), seed))


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nothing(seed: int, tokens: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How to build a family's model, its latents and its texts.

    Attributes:
        joint: text and image tokens in one sequence, the text first; else cross-attention.
        options: what a text carries besides its tokens and the pooled vector.
        patch: side of an image token of a joint family, in latent pixels.
        kind: the host's class in `supported_models`.
        frames: of a video's latent.
        width: of a text token.
        tokens: of a usual text; the only number where `fixed` is set.
        size: height and width to test with, odd where the host can.
        beside: options that follow a text's seed and its number of tokens.
        references: shapes of the reference latents of a text.
        order: what stands in a joint attention's sequence, as measured; `tests/test_families.py` measures it again.
        multiple: of tokens to which text and picture are each filled up behind.
        least: tokens to which a text is filled up in front, or behind where `joint` is not set.
        words: of a text that the network reads in its place, where they are not as many as the text's tokens.
        registers, llama: tokens that stand in the sequence under these names.
        deaf: its attention hears no patch and no override.
        tolerance: largest error of float arithmetic, over a result's deviation.
    """

    model: Callable[..., Any]
    joint: bool
    channels: int
    pooled: bool
    video: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    patch: int = 2
    kind: str = ""
    frames: int = 1
    width: int = WIDTH
    tokens: int = 11
    fixed: bool = False
    size: tuple[int, int] = (9, 7)
    beside: Callable[[int, int], dict[str, Any]] = nothing
    references: tuple[tuple[int, ...], ...] = ()
    order: str = "text picture references"
    multiple: int = 1
    least: int = 0
    words: int = 0
    registers: int = 0
    llama: int = 0
    deaf: bool = False
    tolerance: float = 1e-4

    def conditioning(self, seed: int, tokens: int | None = None, **options: Any) -> list[Any]:
        tokens = self.tokens if tokens is None or self.fixed else tokens
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, self.width, generator=generator)
        pooled = torch.randn(1, POOLED, generator=generator) if self.pooled else None
        drawn = {"reference_latents": [draw(*shape, seed=31 + i) for i, shape in enumerate(self.references)]}
        return [[text, {"pooled_output": pooled, **self.options, **(drawn if self.references else {}),
                        **self.beside(seed, tokens), **options}]]

    def latent(self, batch: int, height: int, width: int) -> torch.Tensor:
        if self.frames > 1:
            return draw(batch, self.channels, self.frames, height, width, seed=7)
        samples = tiny.latent(batch, height, width, channels=self.channels)["samples"]
        return samples.unsqueeze(2) if self.video else samples

    def image_tokens(self, height: int, width: int) -> int:
        """Of a joint family's picture."""
        return self.frames * -(-height // self.patch) * -(-width // self.patch)

    def reference_tokens(self) -> int:
        return sum(-(-shape[-2] // self.patch) * -(-shape[-1] // self.patch) for shape in self.references)

    @property
    def unet(self) -> bool:
        return not self.joint and self.kind in ("", "SD15", "SSD1B", "KOALA_700M", "SDXLRefiner")

    def is_missing(self) -> bool:
        """Whether the running host lacks the family."""
        return bool(self.kind) and not hasattr(supported_models, self.kind)
