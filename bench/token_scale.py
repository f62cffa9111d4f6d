"""What token attention scale costs over the same model and prompt without it, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/token_scale.py [--checkpoint FILE] [--rounds N]
"""
from __future__ import annotations

from timing import load_model, load_pack, make_parser, race

CAPTION = "a striped red star on a blue background"
STEPS = 20


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    load_pack()
    import comfy.sample
    import comfy.samplers
    import nodes
    import torch
    from mixology.host.layout import full_sigmas, make_guider, run_guider
    from mixology.host.token_scale import scale_tokens

    model, clip, side = load_model(arguments.checkpoint)
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (CAPTION, ""))
    patched, scaled = scale_tokens(model, clip, CAPTION, "red = -1.5\nstar = 2", 0.0, 1.0)
    latent = {"samples": torch.zeros(arguments.batch, 4, side, side)}
    sigmas = full_sigmas(model, "euler", "simple", STEPS)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    sampler = comfy.samplers.sampler_object("euler")
    guiders = {"plain": make_guider(model, positive, negative, 7.5),
               "scaled": make_guider(patched, scaled, negative, 7.5)}
    result = race({name: lambda guider=guider: run_guider(guider, sampler, sigmas, latent, noise, 0)
                   for name, guider in guiders.items()}, arguments.rounds)
    print(f"{model.load_device} batch {arguments.batch}: "
          + ", ".join(f"{name} {result.fastest(name) / STEPS * 1000:.2f} ms a step" for name in guiders)
          + f"; {result.compare('scaled', 'plain')}")


if __name__ == "__main__":
    main()
