"""What a step with Feature Injection costs over a plain CFG step, as ratios in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/injection.py [--checkpoint FILE | --real-size] [--rounds N]

Three guiders take turns on the same model, start and sigmas: plain CFG (2 rows a step), injection of features alone and
of all, at every step (3 rows, where the row of the source is read as far as it is needed).
"""
from __future__ import annotations

from timing import CAPTIONS, load_model, load_pack, make_parser, race_guiders


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    load_pack()
    import torch
    from mixology.host.injection import inject_features
    from mixology.host.inversion import invert_latent
    from mixology.host.run import make_guider

    model, encode, side = load_model(arguments)
    positive, negative = encode(CAPTIONS[0]), encode("")
    latent = {"samples": torch.randn(arguments.batch, 4, side, side, generator=torch.Generator().manual_seed(0))}
    with torch.inference_mode():
        trajectory = invert_latent(model, negative, latent, arguments.steps, "simple", "ditail")
    guiders = {"plain": make_guider(model, positive, negative, 7.5)}
    for name, attention in (("features", 0.0), ("all", 1.0)):
        injecting = inject_features(model, trajectory, negative, attention, 1.0)
        guiders[name] = make_guider(injecting, positive, negative, 7.5)
    result = race_guiders(guiders, arguments, side, "injection")
    for name in ("features", "all"):
        print(result.compare(name, "plain"))


if __name__ == "__main__":
    main()
