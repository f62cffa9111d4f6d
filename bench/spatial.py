"""What the Epsilon Merge Guider costs a step, as ratios in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/spatial.py [--checkpoint FILE | --real-size] [--styles N] [--rounds N]

Three guiders take turns on the same model, start and sigmas: plain CFG (2 rows a step), the core's masked conditioning
(N + 1 rows, the bare cost of that many evaluations) and the Epsilon Merge Guider (N + 1 rows).
"""
from __future__ import annotations

from typing import Any

from timing import CAPTIONS, load_model, load_pack, make_parser, race_guiders


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--styles", type=int, default=2)
    arguments = parser.parse_args()
    load_pack()
    import nodes
    from mixology.host.run import make_guider
    from mixology.host.spatial import EpsilonMergeGuider
    from mixology.samplers.spatial import draw_gradient_masks

    model, encode, side = load_model(arguments)
    styles, negative = [encode(CAPTIONS[i % len(CAPTIONS)]) for i in range(arguments.styles)], encode("")
    masks = draw_gradient_masks(side, side, "logistic", arguments.styles, 0.0, 20.0, 1)
    masked: list[Any] = []
    for mask, style in zip(masks, styles):
        masked += nodes.ConditioningSetMask().append(style, mask, "default", 1.0)[0]
    guiders = {
        "plain": make_guider(model, styles[0], negative, 7.5),
        "masked": make_guider(model, masked, negative, 7.5),
        "merged": EpsilonMergeGuider(
            model, masks, {f"positive_{i}": style for i, style in enumerate(styles)}, negative, 7.5),
    }
    result = race_guiders(guiders, arguments, side, f"{arguments.styles} styles")
    print(f"{result.compare('merged', 'masked')} (equal evaluations)")
    print(f"{result.compare('merged', 'plain')} ({arguments.styles + 1} rows against 2)")


if __name__ == "__main__":
    main()
