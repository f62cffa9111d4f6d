"""What token attention scale costs over the same model and prompt without it, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/token_scale.py [--checkpoint FILE | --real-size] [--rounds N]
"""
from __future__ import annotations

from timing import CAPTIONS, load_model, load_pack, make_parser, race_guiders


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    load_pack()
    import torch
    from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
    from mixology.host.marks import mark_conditioning
    from mixology.host.run import make_guider

    model, encode, side = load_model(arguments)
    positive, negative = encode(CAPTIONS[0]), encode("")
    factors = torch.ones(1, positive[0][0].shape[1])
    factors[0, 3:5] = torch.tensor([-1.5, 2.0])
    scaled = mark_conditioning(positive, SCALE_KEY, TokenScale(factors, 0.0, 1.0))
    guiders = {"plain": make_guider(model, positive, negative, 7.5),
               "scaled": make_guider(patch_model(model), scaled, negative, 7.5)}
    result = race_guiders(guiders, arguments, side, "token scale")
    print(result.compare("scaled", "plain"))


if __name__ == "__main__":
    main()
