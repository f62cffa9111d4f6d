"""Image Metrics in the host: pictures against a reference, picture by picture, and the table of it."""
from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch

from ..metrics.image import check_pictures, l2, psnr, smoothness, ssim
from ..metrics.report import average, draw_table
from ..samplers.embeddings import check_image
from ..samplers.wording import format_size
from .metrics_lpips import find_network, measure_lpips

NODE = "Image Metrics"
HEAD = ("picture", "L2", "PSNR dB", "SSIM", "smooth 20%", "smooth all")
MEANING = (
    "More alike: lower L2, smooth and LPIPS; higher PSNR and SSIM.\n"
    "smooth: difference of the total variation from the reference's, as a share of it, in the central 20% of the width "
    "and in all.")

Figures = tuple[str, float, float, float, float, float]


def measure_pictures(image: torch.Tensor, reference: torch.Tensor) -> Figures:
    """The report, and the means of L2, PSNR, SSIM, smoothness in the middle, and LPIPS, which is not a number where its
    networks are not at hand.

    Args:
        image: [B, H, W, C] in 0..1.
        reference: of the same size; one picture, or one for each.

    Raises:
        ValueError: for pictures that are none, and where sizes or numbers of pictures do not fit.
    """
    images, references = (check_image(pictures, NODE).cpu() for pictures in (image, reference))
    check_pictures(images[:, :1, :1], references[:, :1, :1])
    count = len(references)
    if images.shape[1:3] != references.shape[1:3]:
        sizes = (format_size(reversed(pictures.shape[1:3])) for pictures in (images, references))
        raise ValueError(
            f"{NODE} expected pictures of one size, got {next(sizes)} and {next(sizes)} pixels (width x height); bring "
            f"one to the other's with Upscale Image.")
    network = find_network()
    bar = comfy.utils.ProgressBar(len(images))
    rows: list[tuple[str, list[float]]] = []
    for place, picture in enumerate(images):
        comfy.model_management.throw_exception_if_processing_interrupted()
        pair = picture[None], references[place % count][None]
        figures = [l2(*pair), psnr(*pair), ssim(*pair), smoothness(*pair), smoothness(*pair, share=1.0)]
        rows.append((str(place + 1), [float(figure) for figure in figures]))
        bar.update(1)
    distances, told = measure_lpips(images, references, network)
    for (_, figures), distance in zip(rows, distances):
        figures.append(distance)
    means = [average(column) for column in zip(*(figures for _, figures in rows))]
    shown = rows if len(rows) == 1 else [*rows, ("mean", means)]
    head = HEAD if not distances else (*HEAD, "LPIPS")
    size = format_size(reversed(images.shape[1:3]))
    about = f"{len(images)} picture(s) of {size} pixels against {count} reference(s)."
    report = "\n".join([draw_table(head, shown), "", about, MEANING, told])
    lpips = means[5] if distances else float("nan")
    return report, means[0], means[1], means[2], means[3], lpips
