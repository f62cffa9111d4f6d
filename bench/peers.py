"""The peers of `compare.py` in a process of their own, on diffusers' network and schedulers: it reads names of methods
from stdin, a line each, and answers with what a run took.

`CycleDiffusionPipeline` and the schedulers are diffusers' own. The other methods are no part of its package: MagicMix's
rule as in its community pipeline, prompt-to-prompt's reweighting with materialised maps, the injection, the fusion and
the merged prediction are few lines each, as their papers' code does it.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from watch import step_seconds, watch

CFG = 7.5
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                         "clip_sample": False, "steps_offset": 1}


def build_network(config: dict[str, Any], file: Path) -> Any:
    """diffusers' SD1.x network with the weights in a file."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
    depths = config["transformer_depth"][::config["num_res_blocks"][0]]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    network: Any = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=tuple(widths),
        layers_per_block=config["num_res_blocks"][0], cross_attention_dim=config["context_dim"],
        attention_head_dim=config["num_heads"], down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)))
    weights = load_file(file)
    first = next(iter(weights.values()))
    network.load_state_dict(weights)
    return network.to("cuda" if torch.cuda.is_available() else "cpu", first.dtype).train(False)


class Materialised:
    """Prompt-to-prompt's attention: every map is written out, and a prompt's is multiplied by its words' factors."""

    def __init__(self, factors: torch.Tensor):
        self.factors = factors

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 **unused: Any) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(part) for part in
                   (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        maps = attn.get_attention_scores(q, k, attention_mask)
        if encoder_hidden_states is not None:
            half = len(maps) // 2
            maps = torch.cat((maps[:half], maps[half:] * self.factors))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(maps, v)))


class Injected:
    """Self-attention whose rows all take the first row's queries and keys."""

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 **unused: Any) -> Any:
        rows, length, _ = hidden_states.shape
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in
                   (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)))
        q, k = (part[:1].expand(rows, -1, -1, -1) for part in (q, k))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](mixed.transpose(1, 2).reshape(rows, length, -1))


class Methods:
    """Each method samples once, and returns how many steps it made.

    Args:
        tensors: first, second, negative, mix and nothing [1, T, C]; picture and noise [B, 4, H, W]; masks [2, H, W];
            factors [T].
    """

    def __init__(self, network: Any, other: Any, tensors: dict[str, torch.Tensor], steps: int):
        self.network, self.other, self.steps = network, other, steps
        self.tensors = {name: value.to(network.device, network.dtype) for name, value in tensors.items()}
        self.plain = dict(network.attn_processors)

    def read(self, network: Any, states: list[torch.Tensor], t: Any, *names: str) -> tuple[torch.Tensor, ...]:
        """The noise that a network sees in each state under the prompt of that name, in one call."""
        context = torch.cat([self.tensors[name].expand(len(states[0]), -1, -1) for name in names])
        return network(torch.cat(states), t, encoder_hidden_states=context).sample.chunk(len(names))

    def guide(self, network: Any, x: torch.Tensor, t: Any, prompt: str = "first", none: str = "negative") -> Any:
        uncond, cond = self.read(network, [x, x], t, none, prompt)
        return uncond + CFG * (cond - uncond)

    def follow(self, predict: Callable[[torch.Tensor, Any, int], torch.Tensor], first: int = 0) -> int:
        """DDIM from step `first` on, with the noise that `predict` sees."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler(set_alpha_to_one=True, timestep_spacing="leading", **BETAS)
        scheduler.set_timesteps(self.steps)
        times = scheduler.timesteps[first:]
        x = scheduler.add_noise(self.tensors["picture"], self.tensors["noise"], times[:1])
        for i, t in enumerate(times):
            x = scheduler.step(predict(x, t, i), t, x).prev_sample
        return len(times)

    def bare(self) -> int:
        return self.follow(lambda x, t, i: self.guide(self.network, x, t))

    def magicmix(self) -> int:
        from diffusers import DDIMScheduler

        noiser: Any = DDIMScheduler(**BETAS)
        end = int(0.6 * self.steps) - int(0.3 * self.steps)

        def predict(x: torch.Tensor, t: Any, i: int) -> torch.Tensor:
            if 0 < i < end:
                x = 0.5 * x + 0.5 * noiser.add_noise(self.tensors["picture"], self.tensors["noise"], t[None])
            return self.guide(self.network, x, t)

        return self.follow(predict, self.steps - int(0.6 * self.steps))

    def reweight(self) -> int:
        self.network.set_attn_processor(Materialised(self.tensors["factors"]))
        try:
            return self.bare()
        finally:
            self.network.set_attn_processor(dict(self.plain))

    def merge(self) -> int:
        masks = self.tensors["masks"]

        def predict(x: torch.Tensor, t: Any, i: int) -> torch.Tensor:
            uncond, *conds = self.read(self.network, [x, x, x], t, "negative", "first", "second")
            return uncond + CFG * sum(mask * (cond - uncond) for mask, cond in zip(masks, conds))

        return self.follow(predict)

    def cycle(self) -> int:
        from diffusers import CycleDiffusionPipeline, DDIMScheduler

        tensors, made = self.tensors, []

        class FromTensors(CycleDiffusionPipeline):
            """Takes its prompts and its picture as tensors."""

            def encode_prompt(self, prompt: Any, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
                return tensors[prompt], tensors["negative"]

            def prepare_latents(self, image: torch.Tensor, timestep: torch.Tensor, *rest: Any, **options: Any,
                                ) -> tuple[torch.Tensor, torch.Tensor]:
                return self.scheduler.add_noise(image, tensors["noise"], timestep), image

        parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None,
                                 "feature_extractor": None, "requires_safety_checker": False}
        scheduler = DDIMScheduler(set_alpha_to_one=False, timestep_spacing="leading", **BETAS)
        pipeline = FromTensors(unet=self.network, scheduler=scheduler, **parts)
        pipeline.set_progress_bar_config(disable=True)
        pipeline("second", "first", image=tensors["picture"], strength=1.0, num_inference_steps=self.steps,
                 guidance_scale=CFG, source_guidance_scale=1, eta=0.1, generator=torch.Generator().manual_seed(1),
                 output_type="latent", callback=lambda i, t, x: made.append(i))
        return len(made)

    def invert(self) -> int:
        from diffusers import DDIMInverseScheduler

        scheduler: Any = DDIMInverseScheduler(**BETAS)
        scheduler.set_timesteps(self.steps)
        x = self.tensors["picture"]
        for t in scheduler.timesteps:
            x = scheduler.step(self.read(self.network, [x], t, "first")[0], t, x, return_dict=False)[0]
        return len(scheduler.timesteps)

    def inject(self) -> int:
        def predict(x: torch.Tensor, t: Any, i: int) -> torch.Tensor:
            _, uncond, cond = self.read(self.network, [x, x, x], t, "negative", "negative", "first")
            return uncond + CFG * (cond - uncond)

        def share(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output[:1].expand_as(output)

        self.network.set_attn_processor({
            name: Injected() if name.startswith("up_blocks") and ".attn1." in name else processor
            for name, processor in self.plain.items()})
        hook = self.network.up_blocks[1].resnets[1].register_forward_hook(share)
        try:
            return self.follow(predict)
        finally:
            hook.remove()
            self.network.set_attn_processor(dict(self.plain))

    def fuse(self) -> int:
        def predict(x: torch.Tensor, t: Any, i: int) -> torch.Tensor:
            noises, saliencies = [], []
            for network, name in ((self.network, "first"), (self.other, "second")):
                uncond, cond = self.read(network, [x, x], t, "negative", name)
                strength = torch.nn.functional.avg_pool2d((CFG * (cond - uncond)).abs(), 3, 1, 1).mean(1, keepdim=True)
                saliencies.append(strength.flatten(1).softmax(-1).view_as(strength))
                noises.append(uncond + CFG * (cond - uncond))
            return torch.where(saliencies[0] >= saliencies[1], *noises)

        return self.follow(predict)

    def mix(self) -> int:
        return self.follow(lambda x, t, i: self.guide(self.network, x, t, "mix", "nothing"))


def main() -> None:
    from safetensors.torch import load_file

    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    network, other = (build_network(settings["unet"], folder / f"{name}.safetensors") for name in ("network", "other"))
    methods = Methods(network, other, load_file(folder / "tensors.safetensors"), settings["steps"])
    with torch.inference_mode():
        answer({"noise": methods.read(network, [methods.tensors["picture"]], 500, "first")[0].float().tolist()})
        for line in sys.stdin:
            kind, name = line.split()
            run = getattr(methods, name)
            answer(step_seconds(run) if kind == "time" else watch(run, (network, other)))


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
