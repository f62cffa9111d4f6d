"""Train what reads drawn pictures back, and tell how well it does.

    python demo/train_judge.py --world drawings --comfyui PATH --work FOLDER --batch 64 --steps 4000

Learns from the drawn pictures alone: turned, scaled, mirrored, on any colour, tinted, blurred, made coarse, noised, and
two blended into one for what must be seen in mixes. Tested on views that it has not met; writes a table of what it
takes for what. Seeded by step and resumable.
"""
from __future__ import annotations

import math
import sys

from train_base import ARGS, DEVICE, FILES, HERE, WORLD, Trainer, autocast, generator, initialise

sys.path.append(str(HERE.parent))

# isort: split
import drawings
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from train_drawings import BOARD, KNOWN, Pictures, palette, uniform, wild_place

from demo.drawn_judge import STYLES, Network, judge_drawings

COUNT = len(drawings.THINGS)
CHALK, LINE = STYLES.index("chalk"), STYLES.index("line")
TESTED = 10  # views of every drawing


def view(pictures: Pictures, rows: torch.Tensor, g: torch.Generator, chalk: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pictures [B, 3, H, W] of drawings, wildly placed, and their silhouettes [B, H, W]."""
    count = len(rows)
    colours = palette()[torch.randint(len(palette()), (count,), generator=g)] * uniform(g, count, 0.9, 1.1)[:, None]
    colours = torch.where(torch.rand(count, 1, generator=g) < 0.25, torch.rand(count, 3, generator=g), colours)
    line = (rows // COUNT == LINE)[:, None]
    colours = torch.where(line & (colours.mean(dim=1, keepdim=True) < 0.45), 1 - colours, colours)
    board = torch.tensor(BOARD) / 255 * uniform(g, count, 0.7, 1.3)[:, None]
    colours = torch.where(chalk[:, None], board, colours)
    drawn = pictures.warp(rows, wild_place(g, count, 25, 0.6, 1.0))
    ink = torch.where(chalk[:, None, None, None], 0.95 * drawn[:, 3:4], drawn[:, :3])
    return ink + (1 - drawn[:, 3:4]) * colours[..., None, None], drawn[:, 4]


def spoil(pictures: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Halved, tinted, faded, blurred, coarse and noisy, each in its own degree."""
    count, pictures = len(pictures), F.avg_pool2d(pictures, 2)
    gain = 1 + 0.08 * torch.randn(count, 3, 1, 1, generator=g)
    grey = pictures.mean(dim=1, keepdim=True)
    pictures = grey + (pictures - grey) * uniform(g, count, 0.7, 1.25)[:, None, None, None]
    pictures = (pictures - 0.5) * uniform(g, count, 0.75, 1.15)[:, None, None, None] * gain + 0.5
    coarse = F.interpolate(F.avg_pool2d(pictures, 2), pictures.shape[-2:], mode="bilinear")
    share = (uniform(g, count, -1.0, 0.9)).clamp(min=0)[:, None, None, None]
    pictures = pictures * (1 - share) + coarse * share
    level = uniform(g, count, -0.04, 0.08).clamp(min=0)[:, None, None, None]
    return (pictures + level * torch.randn(pictures.shape, generator=g)).clamp(0, 1)


def batch_of(pictures: Pictures, g: torch.Generator, count: int) -> tuple[torch.Tensor, ...]:
    """Pictures, shares of things [B, thing + 1] and styles [B, style], silhouettes; some empty, some blended."""
    rows = torch.randint(KNOWN, (count,), generator=g)
    chalk = torch.rand(count, generator=g) < 0.08
    rows = torch.where(chalk, KNOWN - COUNT + rows % COUNT, rows)
    shown, inside = view(pictures, rows, g, chalk)
    things = F.one_hot(rows % COUNT, COUNT + 1).float()
    styles = F.one_hot(torch.where(chalk, CHALK, rows // COUNT), len(STYLES)).float()
    fade = torch.rand(count, generator=g) < 0.04  # nothing is left
    plain = palette()[torch.randint(len(palette()), (count,), generator=g)][..., None, None]
    shown = torch.where(fade[:, None, None, None], plain, shown)
    things[fade] = F.one_hot(torch.tensor(COUNT), COUNT + 1).float()
    inside = inside * ~fade[:, None, None]
    mix = torch.where(torch.rand(count, generator=g) < 0.2, uniform(g, count, 0.3, 0.7), 0.0)
    mix[fade | fade.roll(1)] = 0
    wide, tall = mix[:, None], mix[:, None, None, None]
    return (spoil(shown * (1 - tall) + shown.roll(1, 0) * tall, g), things * (1 - wide) + things.roll(1, 0) * wide,
            styles * (1 - wide) + styles.roll(1, 0) * wide,
            torch.maximum(inside, inside.roll(1, 0) * (mix > 0)[:, None, None]), fade)


def train() -> Trainer:
    pictures, network = Pictures(ARGS.work, ARGS.pictures), Network()
    initialise(network, 11)
    trainer = Trainer("judge", network, 2e-3, 0.998)
    while trainer.step < ARGS.steps:
        g = generator(12, trainer.step)
        shown, things, styles, inside, fade = (value.to(DEVICE) for value in batch_of(pictures, g, ARGS.batch))
        with autocast():
            found = trainer.network(shown)
        named, drawn, seen = (value.float() for value in found)
        kept = (~fade).float()
        losses = {
            "thing": F.cross_entropy(named, things, label_smoothing=0.05),
            "style": (F.cross_entropy(drawn, styles, reduction="none", label_smoothing=0.05) * kept).mean(),
            "inside": F.binary_cross_entropy_with_logits(seen, F.avg_pool2d(inside[:, None], 2)[:, 0]),
        }
        progress = trainer.step / ARGS.steps
        trainer.update(losses["thing"] + 0.5 * losses["style"] + losses["inside"],
                       0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        hits = (named.argmax(dim=1) == things.argmax(dim=1)).float().mean()
        trainer.report(ARGS.steps, hits=hits.item(), **{name: value.item() for name, value in losses.items()})
    return trainer


def test(network: Network) -> None:
    """Held-out views of every drawing: hits by style, silhouettes, and what is taken for what."""
    pictures = Pictures(ARGS.work, ARGS.pictures)
    hits, styles, overlaps, wrong = torch.zeros(len(WORLD.STYLES)), torch.zeros(len(WORLD.STYLES)), [], {}
    for number in range(TESTED):
        for style, name in enumerate(WORLD.STYLES):
            rows = torch.arange(COUNT) + style * COUNT
            shown, inside = view(pictures, rows, generator(13, number, style), torch.zeros(COUNT, dtype=torch.bool))
            verdict = judge_drawings(shown.movedim(1, -1), network)
            right = verdict.shows(list(drawings.THINGS))
            hits[style] += right.float().mean() / TESTED
            styles[style] += verdict.shows_styles([name] * COUNT).float().mean() / TESTED
            both, either = (verdict.mask > 0.5) & (inside > 0.5), (verdict.mask > 0.5) | (inside > 0.5)
            overlaps.append((both.sum(dim=(1, 2)) / either.sum(dim=(1, 2)).clamp(min=1)).mean())
            for thing in (~right).nonzero().flatten().tolist():
                pair = (drawings.THINGS[thing], drawings.THINGS[int(verdict.things[thing].argmax())])
                wrong[pair] = wrong.get(pair, 0) + 1
    for style, name in enumerate(WORLD.STYLES):
        print(f"judge: {name}: thing {hits[style]:.2%}, style {styles[style]:.2%}", flush=True)
    print(f"judge: thing {hits.mean():.2%}, style {styles.mean():.2%}, silhouette {torch.stack(overlaps).mean():.3f}")
    for (shown, taken), times in sorted(wrong.items(), key=lambda pair: -pair[1])[:20]:
        print(f"judge: {shown} taken for {taken} {times} times of {TESTED * len(WORLD.STYLES)}", flush=True)


def main() -> None:
    average, network = train().average, Network()
    network.load_state_dict(average)
    test(network.train(False).requires_grad_(False))
    state = {name: value.half().contiguous().cpu() for name, value in average.items()}
    save_file(state, FILES / "judge.safetensors")
    print(f"judge: {sum(value.numel() for value in state.values()) / 1e6:.2f} M parameters", flush=True)


if __name__ == "__main__":
    main()
