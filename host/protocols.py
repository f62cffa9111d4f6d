"""What this pack asks of the host's objects, so that those of other packs which offer the same pass as well."""
from __future__ import annotations

from typing import Any, Protocol

import torch


class Patcher(Protocol):
    """A MODEL: the host's ModelPatcher."""

    model: Any
    model_options: dict[str, Any]
    load_device: Any

    def clone(self) -> Any: ...

    def get_model_object(self, name: str) -> Any: ...

    def get_all_wrappers(self, wrapper_type: str) -> list[Any]: ...

    def is_dynamic(self) -> bool: ...


class Guider(Protocol):
    """A GUIDER in a run, as samplers see it: the host's CFGGuider, whose model is loaded."""

    model_patcher: Any
    model_options: dict[str, Any]
    inner_model: Any
    conds: dict[str, Any]


class Sampler(Protocol):
    """A SAMPLER: the host's KSAMPLER, or one that does its own."""

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool: ...

    def sample(self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any,
               noise: torch.Tensor, latent_image: torch.Tensor | None = None,
               denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False) -> torch.Tensor: ...
