"""Content injection written out by the tests: source and target rows in one batch of the model, as published.

Hooks on the networks' own `to_q`, `to_k` and `out_layers`, or an attention override where there are none; nothing of
the pack is involved but the trajectory.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import tiny
import torch
from attention_merge_rig import cell_means
from mixology.host.inversion import invert_latent
from mixology.host.trajectory import Trajectory, start_trajectory
from torch import Tensor

SD1_BLOCKS = [("output", i) for i in range(4, 12)]
Shape = tuple[int, int]


def invert(model: Any, conditioning: Any, latent: dict[str, Any], steps: int = 6) -> Trajectory:
    return invert_latent(model, conditioning, latent, steps, "ddim_uniform", "ditail")


def run(guider: Any, trajectory: Trajectory, sampler: Any = "euler", callback: Any = None,
        sigmas: Tensor | None = None) -> Tensor:
    """Sampling from a trajectory's end with its own sigmas."""
    noise, grid, latent = start_trajectory(trajectory)
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(noise.generate_noise(latent), latent["samples"], sampler,
                         grid if sigmas is None else sigmas, denoise_mask=latent.get("noise_mask"), callback=callback,
                         disable_pbar=True, seed=noise.seed)


class OneReading(comfy.samplers.Sampler):
    """What a guider predicts in a trajectory's last state, to the bit: a sampler's own start is rounded."""

    def __init__(self, state: Tensor):
        self.state = state

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return model_wrap(self.state, sigmas[:1].expand(len(self.state)), **extra_args)


def in_single_chunks(model: Any) -> Any:
    """The model on a machine without memory to spare: every conditioning in a call of its own."""
    clone = model.clone()
    clone.get_free_memory = lambda device: 1.0
    return clone


def block_of(network: Any, name: tuple[str, int]) -> Any:
    place, index = name
    return network.middle_block if place == "middle" else getattr(network, f"{place}_blocks")[index]


def active(model: Any, sigma: Tensor, until: float) -> bool:
    """Whether the time is before `until`, from the model's own clock: 999 to 0, or 1000 to 0 for flow models."""
    sampling = model.model_sampling
    if type(sampling).__mro__[1].__name__.endswith("Flow") or not hasattr(sampling, "log_sigmas"):
        return float(sigma[0]) > float(sampling.percent_to_sigma(until)) + 1e-6
    return float(sampling.timestep(sigma[:1])) > 999 * (1 - until) + 1e-3


def source_arguments(model: Any, source: Any, images: int, state: Tensor) -> dict[str, Tensor]:
    """What the network is told of a source prompt, by the names of its arguments."""
    text, options = source[0]
    values = {"width": state.shape[-1] * 8, "height": state.shape[-2] * 8, "prompt_type": "positive",
              "latent_image": state, "seed": 0, **options}
    conds = model.extra_conds(device=torch.device("cpu"), noise=state, cross_attn=text, **values)
    return {key: cond.process_cond(batch_size=images, area=None).cond for key, cond in conds.items()}


def blend(own: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    return weight.to(own) * source + (1 - weight.to(own)) * own


@dataclass
class Hooks:
    """Hooks on a network that keep or replace what its modules put out.

    Attributes:
        images: rows of the source; replaced are as many rows at a time of all others.
        kept: what a reader put out, by module; None where the source is in the same batch, its rows first.
        weight: of the source at height x width tokens or cells, [1 or images, height, width].
    """

    images: int
    kept: dict[Any, Tensor] | None
    weight: Callable[[int, int], Tensor]
    keeping: bool = False
    shape: Shape = (0, 0)

    def visit(self, name: Any, output: Tensor, weights: Tensor) -> Tensor | None:
        if self.keeping and self.kept is not None:
            self.kept[name] = output
            return None
        first = 0 if self.kept is not None else self.images
        source = self.kept[name] if self.kept is not None else output[:first]
        rest = output[first:].unflatten(0, (-1, self.images))
        return torch.cat([output[:first], blend(rest, source[None], weights).flatten(0, 1)])

    @contextmanager
    def on(self, network: Any, blocks: Sequence[tuple[str, int]], attention: bool, features: bool) -> Iterator[None]:
        def note_shape(module: Any, args: Any) -> None:
            self.shape = tuple(args[0].shape[-2:])

        def tokens(name: Any) -> Any:
            return lambda module, args, output: self.visit(
                name, output, self.weight(*self.shape).flatten(1).unsqueeze(-1))

        def cells(module: Any, args: Any, output: Tensor) -> Tensor | None:
            return self.visit("features", output, self.weight(*output.shape[-2:]).unsqueeze(1))

        with ExitStack() as stack:
            for name in blocks if attention else []:
                layer = block_of(network, name)[1]
                stack.callback(layer.register_forward_pre_hook(note_shape).remove)
                for depth, inner in enumerate(layer.transformer_blocks):
                    for part in ("to_q", "to_k"):
                        module = getattr(inner.attn1, part)
                        stack.callback(module.register_forward_hook(tokens((name, depth, part))).remove)
            if features:
                layer = block_of(network, blocks[0])[0].out_layers
                stack.callback(layer.register_forward_hook(cells).remove)
            yield


def inject_explicitly(model: Any, trajectory: Trajectory, source: Any, attention_until: float, features_until: float,
                      blocks: Sequence[tuple[str, int]], mask: Tensor | None = None, reader: Any = None,
                      area: tuple[int, int, int, int] | None = None, shared: Sequence[str] = ()) -> Any:
    """A clone of a UNet whose every call has the source in its batch, as published.

    Args:
        mask: [N, H, W]; area: height, width, y, x of calls that are smaller than the picture.
        reader: another instance of the network that reads the source alone, without what conditionings carry.
        shared: arguments of the network that the source has from the targets' first rows.
    """
    def wrapper(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        x, sigma, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
        network, times = model.model, (attention_until, features_until)
        injected = [active(network, sigma, until) for until in times]
        if not any(injected):
            return apply_model(x, sigma, **c)
        images = len(x) // len(arguments["cond_or_uncond"])
        height, width = trajectory.states.shape[-2:]
        state = trajectory.state_at(float(sigma[0]), x.new_empty(images, x.shape[1], height, width))
        whole = x.shape == (len(x), *state.shape[1:])
        rows, columns, top, left = (height, width, 0, 0) if whole or area is None else area
        state = state[..., top:top + rows, left:left + columns]

        def weight(*layer: int) -> Tensor:
            shown = torch.ones(1, height, width) if mask is None else cell_means(mask, height, width)
            return cell_means(shown[:, top:top + rows, left:left + columns], *layer).float()

        own = {**source_arguments(network, source, images, state), **{name: c[name][:images] for name in shared}}
        if reader is not None:
            hooks = Hooks(images, {}, weight, keeping=True)
            with hooks.on(reader.model.diffusion_model, blocks, *injected):
                reader.model.apply_model(state, sigma[:images], **own, transformer_options={})
            hooks.keeping = False
            with hooks.on(network.diffusion_model, blocks, *injected):
                return apply_model(x, sigma, **c)
        for key, value in own.items():
            if torch.is_tensor(c.get(key)):
                tokens = c[key].shape[1] // value.shape[1] if key == "c_crossattn" else 1
                value = value.repeat(1, tokens, 1) if tokens > 1 else value
                c[key] = torch.cat([value.to(c[key]), c[key]])
        with Hooks(images, None, weight).on(network.diffusion_model, blocks, *injected):
            return apply_model(torch.cat([state, x]), torch.cat([sigma[:images], sigma]), **c)[images:]

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def inject_joint_explicitly(model: Any, trajectory: Trajectory, source: Any, attention_until: float, blocks: int,
                            weight: Tensor, query_scale: float = 1.0,
                            others: int = 0, source_others: int = 0) -> Any:
    """A clone of a diffusion transformer that reads the source in a call of its own before each other.

    Args:
        blocks: joint attentions of the model, the later half of which is injected.
        weight: of the source at each token of the picture.
        query_scale: what another node does to all queries after.
        others, source_others: tokens behind the picture's, in target and source.
    """
    picture = len(weight)

    def make_override(kept: dict[Any, Tensor], replace: bool, images: int) -> Callable[..., Tensor]:
        index = -1

        def attend(func: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal index
            axis = 2 if kwargs.get("skip_reshape") else 1
            alone = q.shape[axis] == picture
            index += not alone
            last = q.shape[axis] - (0 if alone else others if replace else source_others)
            first = last - picture
            if index >= (blocks + 1) // 2:
                for name, tensor in (("q", q), ("k", k)):
                    rows = tensor.narrow(axis, first, picture)
                    if replace:
                        repeated = kept[index, alone, name].repeat(len(q) // images, *[1] * (q.ndim - 1))
                        new = blend(rows, repeated, weight[:, None])
                        rest = tensor.narrow(axis, last, tensor.shape[axis] - last)
                        whole = torch.cat([tensor.narrow(axis, 0, first), new, rest], dim=axis)
                        q, k = (whole, k) if name == "q" else (q, whole)
                    else:
                        kept[index, alone, name] = rows.clone()
            return func(q * query_scale, k, v, *args, **kwargs)

        return attend

    return inject_by_override(model, trajectory, source, attention_until, make_override)


def inject_by_override(model: Any, trajectory: Trajectory, source: Any, attention_until: float,
                       make_override: Callable[[dict[Any, Tensor], bool, int], Callable[..., Tensor]]) -> Any:
    """A clone of a model that reads the source in a call of its own before each other.

    Args:
        make_override: of what is kept, whether it is a target's call, and the number of images.
    """
    def wrapper(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        x, sigma, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
        if not active(model.model, sigma, attention_until):
            return apply_model(x, sigma, **c)
        images = len(x) // len(arguments["cond_or_uncond"])
        state, kept = trajectory.state_at(float(sigma[0]), x[:images]), {}
        options = c.pop("transformer_options")
        own = {key: value for key, value in source_arguments(model.model, source, images, state).items()
               if value is not None}
        reading = make_override(kept, False, images)
        apply_model(state, sigma[:images], **own,
                    transformer_options={**options, "optimized_attention_override": reading})
        writing = make_override(kept, True, images)
        return apply_model(x, sigma, **c, transformer_options={**options, "optimized_attention_override": writing})

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def soft_mask(batch: int = 1, height: int = 40, width: int = 24, seed: int = 3) -> Tensor:
    """Random values from 0 to 1 that change from pixel to pixel."""
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed))


def guide(model: Any, positive: Any, negative: Any, cfg: Any = 3.0) -> Any:
    return tiny.cfg_guider(model, positive, negative, cfg)
