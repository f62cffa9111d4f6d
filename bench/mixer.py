"""What sampling from a mix costs over sampling from a prompt on the same model, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/mixer.py [--checkpoint FILE | --real-size] [--rounds N]
"""
from __future__ import annotations

from timing import CAPTIONS, load_model, load_pack, make_parser, race_guiders


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    load_pack()
    import torch
    from mixology.host.mixer import make_conditioning
    from mixology.host.run import make_guider
    from mixology.samplers.mixer import Mixer, add_source

    model, encode, side = load_model(arguments)
    positive, negative = encode(CAPTIONS[0]), encode("")
    mixer: Mixer = ()
    for seed in range(5):
        embedding = torch.randn(1, positive[0][0].shape[-1], generator=torch.Generator().manual_seed(seed))
        mixer = add_source(mixer, embedding, 1.0)
    guiders = {"prompt": make_guider(model, positive, negative, 3.0),
               "mix": make_guider(model, *make_conditioning(mixer, "concat", 5), 3.0)}
    result = race_guiders(guiders, arguments, side, "image mixer")
    print(result.compare("mix", "prompt"))


if __name__ == "__main__":
    main()
