"""What the Saliency Fusion Guider costs a step, as ratios in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/fusion.py [--checkpoint FILE | --real-size] [--rounds N]

Four guiders take turns on the same start and sigmas: plain CFG (2 rows a step), and the fusion of two checkpoints (2
rows of each), of two prompts on one model (3 rows in one call), and of two differently patched clones of one checkpoint
(2 rows of each; with weights of their own where memory allows, else patched anew between them).
"""
from __future__ import annotations

from typing import Any

from timing import CAPTIONS, load_model, load_pack, make_parser, patch_slightly, race_guiders


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    load_pack()
    from mixology.host.experts import add_expert
    from mixology.host.fusion import SaliencyGuider
    from mixology.host.run import make_guider

    (model, encode, side), (other, *_) = load_model(arguments), load_model(arguments)
    first, second, negative = encode(CAPTIONS[0]), encode(CAPTIONS[1]), encode("")

    def fuse(*pairs: Any) -> SaliencyGuider:
        experts: tuple[Any, ...] = ()
        for patcher, prompt in pairs:
            experts = add_expert(patcher, prompt, negative, 7.5, 1.0, experts)
        return SaliencyGuider(experts, 4.0, 0.0, 0.0, 1.0, 0, "own")

    guiders = {
        "plain": make_guider(model, first, negative, 7.5),
        "checkpoints": fuse((model, first), (other, second)),
        "prompts": fuse((model, first), (model, second)),
        "clones": fuse((patch_slightly(model), first), (patch_slightly(model), second)),
    }
    result = race_guiders(guiders, arguments, side, "2 experts")
    print(f"{result.compare('checkpoints', 'plain')} (4 rows against 2)")
    print(f"{result.compare('prompts', 'plain')} (3 rows against 2)")
    print(f"{result.compare('clones', 'checkpoints')} (differently patched)")


if __name__ == "__main__":
    main()
