"""Measures MagicMix on the demo checkpoint: what stays of the layout, what arrives of the content."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gallery import Curve, Plot, Table
from stage import Stage, pure_room, read_pictures
from workflow import Workflow

PARTS = ("shape", "colour", "texture")
STRENGTHS = (0.3, 0.45, 0.6, 0.75)  # plain image to image: nu 1 from k
Pair = tuple[str, str]
Prepare = Callable[[Stage, str, str, int, Sequence[str]], Workflow]


@dataclass(frozen=True)
class Reading:
    """Means over pictures: overlap with the layout's silhouette, and the judge's score of each part of the prompt."""

    overlap: float
    parts: Sequence[float]

    @property
    def content(self) -> float:
        return sum(self.parts) / len(self.parts)


def count_runs(pairs: Sequence[Pair], seeds: int) -> int:
    return len(pairs) * seeds * (1 + len(STRENGTHS))


def measure(stage: Stage, pairs: Sequence[Pair], seeds: int, nus: Sequence[str], prepare: Prepare,
            ) -> tuple[list[Plot], list[Table]]:
    """Curves over nu, against plain image to image of rising strength on the same layouts, prompts and noise."""
    mixed: list[list[Any]] = []
    plain: list[list[Any]] = []
    for number, (layout, content) in enumerate(pairs):
        for seed in range(1000 * (number + 1), 1000 * (number + 1) + seeds):
            workflow = prepare(stage, layout, content, seed, nus)
            mixed.append(read(stage, workflow, layout, content, seed))
            readings = []
            for k in STRENGTHS:
                workflow = prepare(stage, layout, content, seed, ())
                workflow.set("Layout Mix", nu=1.0, nu_per_image="", k_max=k, k_min=k)
                readings += read(stage, workflow, layout, content, seed)
            plain.append(readings)
    return draw([float(nu) for nu in nus], average(mixed), average(plain), len(mixed))


def read(stage: Stage, workflow: Workflow, layout: str, content: str, seed: int) -> list[Any]:
    """One row for every picture of the run: overlap, then the parts."""
    import torch

    judge, world = pure_room("demo.judge"), pure_room("demo.world")
    run = stage.run(workflow, f"measuring: {layout} + {content}")
    verdict = judge.judge_pictures(read_pictures(run.images[workflow.find("Save Image")]))
    _, mask = world.draw_scene(world.parse_caption(layout), seed, stage.side, stage.side)
    scene = world.parse_caption(content)
    columns = [judge.silhouette_overlap(verdict.mask, mask.expand_as(verdict.mask))]
    columns += [verdict.score(part, getattr(scene, part)) for part in PARTS]
    return list(torch.stack(columns, dim=1))


def average(rows: list[list[Any]]) -> list[Reading]:
    """Means over runs, for each place in the batch."""
    import torch

    means = torch.stack([torch.stack(row) for row in rows]).mean(dim=0)
    return [Reading(float(row[0]), row[1:].tolist()) for row in means]


def draw(nus: list[float], mixed: list[Reading], plain: list[Reading], count: int) -> tuple[list[Plot], list[Table]]:
    over_nu = Plot(
        "What stays, what arrives", "nu", "mean score", [
            Curve("silhouette kept", [(nu, r.overlap) for nu, r in zip(nus, mixed)]),
            Curve("prompt recognised", [(nu, r.content) for nu, r in zip(nus, mixed)]),
        ], (0.0, 1.0))
    trade = Plot(
        "The price of content", "prompt's parts recognised", "overlap with the layout", [
            Curve("MagicMix", [(r.content, r.overlap) for r in mixed]),
            Curve("image to image", [(r.content, r.overlap) for r in plain], dashed=True),
        ], (0.0, 1.0))
    head = ("setting", "overlap", *PARTS)
    rows = [(name, *(f"{value:.2f}" for value in (reading.overlap, *reading.parts)))
            for name, reading in [*((f"MagicMix, nu {nu:g}", r) for nu, r in zip(nus, mixed)),
                                  *((f"image to image from k {k:g}", r) for k, r in zip(STRENGTHS, plain))]]
    return [over_nu, trade], [Table((f"{head[0]} (mean of {count} pictures)", *head[1:]), rows)]
