"""What cross-attention merge costs a step over plain CFG, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/attention_merge.py [--checkpoint FILE | --real-size] [--styles N]

Plain CFG and CFG with a merged positive prompt take turns on the same model, start and sigmas, both with 2 rows a step.
"""
from __future__ import annotations

from timing import CAPTIONS, load_model, load_pack, make_parser, race_guiders


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--styles", type=int, default=2)
    arguments = parser.parse_args()
    load_pack()
    from mixology.host.attention_merge import merge_conditionings
    from mixology.host.run import make_guider
    from mixology.samplers.spatial import draw_gradient_masks

    model, encode, side = load_model(arguments)
    styles, negative = [encode(CAPTIONS[i % len(CAPTIONS)]) for i in range(arguments.styles)], encode("")
    masks = draw_gradient_masks(side * 8, side * 8, "logistic", arguments.styles, 0.0, 20.0, 1)
    merging, merged = merge_conditionings(
        model, masks, {f"conditioning_{i}": style for i, style in enumerate(styles)})
    guiders = {"plain": make_guider(model, styles[0], negative, 7.5),
               "merged": make_guider(merging, merged, negative, 7.5)}
    result = race_guiders(guiders, arguments, side, f"{arguments.styles} styles")
    print(result.compare("merged", "plain"))


if __name__ == "__main__":
    main()
