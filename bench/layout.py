"""What MagicMix costs over a bare core sampler at equal model evaluations, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/layout.py [--checkpoint FILE | --real-size] [--rounds N]

The wrapped and the bare sampler take turns on the same model, prompts, start and sigmas; the ratio of the fastest runs
is printed, with the median of the pairwise ratios beside it. Without a checkpoint the demo checkpoint is measured.
"""
from __future__ import annotations

from typing import Any

from timing import CAPTIONS, load_model, load_pack, make_parser, race


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sampler", default="ddim")
    parser.set_defaults(steps=50)
    arguments = parser.parse_args()
    load_pack()
    import comfy.sample
    import comfy.samplers
    import torch
    from mixology.host import layout as magicmix
    from mixology.host.run import full_sigmas, make_guider, run_guider

    model, encode, side = load_model(arguments)
    positive, negative = encode(CAPTIONS[0]), encode("")
    latent = {"samples": torch.randn(arguments.batch, 4, side, side, generator=torch.Generator().manual_seed(0))}
    sigmas = full_sigmas(model, arguments.sampler, "ddim_uniform", arguments.steps)
    window = magicmix.sigma_window(model.model, sigmas, 0.6, 0.3)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    bare = comfy.samplers.sampler_object(arguments.sampler)
    mixing = magicmix.LayoutMixSampler(bare, magicmix.make_layout(latent, 0, "shared"), magicmix.Mix(0.5, 0.6, 0.3))
    guider = make_guider(model, positive, negative, 7.5)

    def sample(sampler: Any, grid: Any) -> Any:
        return run_guider(
            guider, sampler, grid, {**latent, "noise_mask": None}, noise=noise, seed=0)

    result = race({"bare": lambda: sample(bare, sigmas[window.start:]), "mixed": lambda: sample(mixing, sigmas)},
                  arguments.rounds)
    steps = len(sigmas) - 1 - window.start
    print(f"{model.load_device} {arguments.sampler} batch {arguments.batch}: bare "
          f"{result.fastest('bare') / steps * 1000:.2f} ms, mixed {result.fastest('mixed') / steps * 1000:.2f} ms a "
          f"step; {result.compare('mixed', 'bare')}")


if __name__ == "__main__":
    main()
