"""What cross-attention merge costs a step over plain CFG, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/attention_merge.py [--checkpoint FILE | --real-size] [--styles N]

Plain CFG and CFG with a merged positive prompt take turns on the same model, start and sigmas, both with 2 rows a step.
"""
from __future__ import annotations

from timing import CAPTIONS, load_model, load_pack, make_parser, race


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--styles", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    load_pack()
    import comfy.sample
    import comfy.samplers
    import torch
    from mixology.host.attention_merge import merge_conditionings
    from mixology.host.layout import full_sigmas, make_guider, run_guider
    from mixology.samplers.spatial import draw_gradient_masks

    model, encode, side = load_model(arguments)
    styles, negative = [encode(CAPTIONS[i % len(CAPTIONS)]) for i in range(arguments.styles)], encode("")
    latent = {"samples": torch.zeros(arguments.batch, 4, side, side)}
    sigmas = full_sigmas(model, "euler", "simple", arguments.steps)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    masks = draw_gradient_masks(side * 8, side * 8, "logistic", arguments.styles, 0.0, 20.0, 1)
    merging, merged = merge_conditionings(
        model, masks, {f"conditioning_{i}": style for i, style in enumerate(styles)})
    sampler = comfy.samplers.sampler_object("euler")
    guiders = {"plain": make_guider(model, styles[0], negative, 7.5),
               "merged": make_guider(merging, merged, negative, 7.5)}
    result = race({name: lambda guider=guider: run_guider(guider, sampler, sigmas, latent, noise, 0)
                   for name, guider in guiders.items()}, arguments.rounds)
    print(f"{model.load_device} {arguments.styles} styles batch {arguments.batch}: "
          + ", ".join(f"{name} {result.fastest(name) / arguments.steps * 1000:.2f} ms a step" for name in guiders)
          + f"; {result.compare('merged', 'plain')}")


if __name__ == "__main__":
    main()
