"""What this pack asks of the host's objects, so that those of other packs which offer the same pass as well."""
from __future__ import annotations

from typing import Any, Protocol

import torch


class Patcher(Protocol):
    """A MODEL: the host's ModelPatcher."""

    model: Any
    model_options: dict[str, Any]
    load_device: Any
    cached_patcher_init: Any  # the loader that made it, and its arguments; None if that is not known
    patches_uuid: Any
    object_patches: dict[str, Any]
    hook_patches: dict[Any, Any]

    def clone(self, *args: Any, **kwargs: Any) -> Any: ...

    def is_clone(self, other: Any) -> bool: ...

    def deepclone_multigpu(self) -> Any: ...

    def get_clone_model_override(self) -> Any: ...

    def model_size(self) -> int: ...

    def get_model_object(self, name: str) -> Any: ...

    def get_all_wrappers(self, wrapper_type: str) -> list[Any]: ...

    def is_dynamic(self) -> bool: ...


class Guider(Protocol):
    """A GUIDER: the host's CFGGuider. In a run, as samplers see it, its model is loaded."""

    model_patcher: Any
    model_options: dict[str, Any]
    inner_model: Any
    conds: dict[str, Any]

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def sample(self, noise: Any, latent_image: Any, sampler: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any,
               ) -> Any: ...


class Sampler(Protocol):
    """A SAMPLER: the host's KSAMPLER, or one that does its own."""

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool: ...

    def sample(self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any,
               noise: torch.Tensor, latent_image: torch.Tensor | None = None,
               denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False) -> torch.Tensor: ...
