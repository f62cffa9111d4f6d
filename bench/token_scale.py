"""What token attention scale costs over the same model and prompt without it, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/token_scale.py [--checkpoint FILE | --real-size] [--rounds N]
"""
from __future__ import annotations

from timing import CAPTIONS, load_model, load_pack, make_parser, race


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    load_pack()
    import comfy.sample
    import comfy.samplers
    import torch
    from mixology.host.layout import full_sigmas, make_guider, run_guider
    from mixology.host.marks import mark_conditioning
    from mixology.host.token_scale import KEY, TokenScale, patch_model

    model, encode, side = load_model(arguments)
    positive, negative = encode(CAPTIONS[0]), encode("")
    factors = torch.ones(1, positive[0][0].shape[1])
    factors[0, 3:5] = torch.tensor([-1.5, 2.0])
    scaled = mark_conditioning(positive, KEY, TokenScale(factors, 0.0, 1.0))
    latent = {"samples": torch.zeros(arguments.batch, 4, side, side)}
    sigmas = full_sigmas(model, "euler", "simple", arguments.steps)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    sampler = comfy.samplers.sampler_object("euler")
    guiders = {"plain": make_guider(model, positive, negative, 7.5),
               "scaled": make_guider(patch_model(model), scaled, negative, 7.5)}
    result = race({name: lambda guider=guider: run_guider(guider, sampler, sigmas, latent, noise, 0)
                   for name, guider in guiders.items()}, arguments.rounds)
    print(f"{model.load_device} batch {arguments.batch}: "
          + ", ".join(f"{name} {result.fastest(name) / arguments.steps * 1000:.2f} ms a step" for name in guiders)
          + f"; {result.compare('scaled', 'plain')}")


if __name__ == "__main__":
    main()
