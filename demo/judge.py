"""Reads demo pictures back: which shape, colour, texture and background does a picture show?

The judge shares nothing with the demo checkpoints. It measures: the background from the border, the
silhouette by colour, the shape by template overlap and the texture by its spatial frequencies.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from .world import (
    CHECKER_CELL,
    COLOURS,
    DOT_RADIUS,
    REFERENCE_SIDE,
    SHAPES,
    TEXTURE_PERIOD,
    TEXTURES,
    ink_of,
    inside_shape,
)

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "background": tuple(COLOURS),
}
PRESENCE_THRESHOLD = 0.03  # area fraction; the smallest shape of the demo world covers four times that
CHUNK = 64  # pictures judged at once, to bound memory
RING = 5  # width of the border ring in pixels
GRID = 48  # cells of a normalised silhouette
GRID_SPAN = 1.25  # half side of the normalised grid in units of sqrt(area)
TONE_COST = 0.15  # squared cost of a change of tone, relative to a change of hue
WINDOW = 10.0  # sigma of the local texture window in pixels


@dataclass(frozen=True)
class Verdict:
    """What a batch of pictures shows.

    `scores` maps an attribute to [B, n] in 0..1, in the order of `VALUES[attribute]`; a row sums to at
    most one and the missing rest says "none of these". `presence` [B] is the silhouette's share of the
    picture (of the region, in `judge_region`) and `mask` [B, H, W] in 0..1 the silhouette.
    """

    scores: dict[str, torch.Tensor]
    mask: torch.Tensor
    presence: torch.Tensor

    @property
    def present(self) -> torch.Tensor:
        """Boolean [B]: is there any shape at all?"""
        return self.presence >= PRESENCE_THRESHOLD

    def names(self, attribute: str) -> list[str]:
        """The best value of each picture, '' where none of them fits."""
        scores = self._scores_of(attribute)
        best = scores.argmax(dim=1)
        fits = scores.amax(dim=1) > 1 - scores.sum(dim=1)
        return [VALUES[attribute][i] if fit else "" for i, fit in zip(best.tolist(), fits.tolist())]

    def score(self, attribute: str, value: str) -> torch.Tensor:
        """The score [B] of one value."""
        scores = self._scores_of(attribute)
        if value not in VALUES[attribute]:
            raise ValueError(f"The {attribute} must be one of {', '.join(VALUES[attribute])}, got '{value}'.")
        return scores[:, VALUES[attribute].index(value)]

    def recognised(self, attribute: str, values: list[str]) -> torch.Tensor:
        """Boolean [B]: does picture i show values[i]?"""
        names = self.names(attribute)
        if len(values) != len(names):
            raise ValueError(f"Expected one {attribute} for each of the {len(names)} pictures, got {len(values)}.")
        unknown = [value for value in values if value not in VALUES[attribute]]
        if unknown:
            raise ValueError(f"The {attribute} must be one of {', '.join(VALUES[attribute])}, got '{unknown[0]}'.")
        return torch.tensor([name == value for name, value in zip(names, values)], dtype=torch.bool)

    def _scores_of(self, attribute: str) -> torch.Tensor:
        if attribute not in self.scores:
            raise ValueError(f"This verdict knows {', '.join(self.scores)}, got '{attribute}'.")
        return self.scores[attribute]


def judge_pictures(images: torch.Tensor) -> Verdict:
    """Judge pictures [B, H, W, C] in 0..1, of any size; they are read at 128 pixels on the short side."""
    return _join([_judge_chunk(chunk) for chunk in _check_images(images).split(CHUNK)])


def judge_region(images: torch.Tensor, region_mask: torch.Tensor) -> Verdict:
    """Judge colour and texture of the part of the shape inside `region_mask`, [H, W] or [B, H, W].

    `presence` is the share of the region that the shape covers.
    """
    images = _check_images(images)
    regions = region_mask.expand(len(images), -1, -1) if region_mask.ndim == 2 else region_mask
    if regions.shape != images.shape[:3]:
        raise ValueError(
            f"The region must be as large as the pictures, {tuple(images.shape[:3])} or {tuple(images.shape[1:3])}, "
            f"got {tuple(region_mask.shape)}."
        )
    chunks = zip(images.split(CHUNK), regions.to(images).split(CHUNK))
    return _join([_judge_chunk(chunk, region) for chunk, region in chunks])


def silhouette_overlap(mask_a: torch.Tensor, mask_b: torch.Tensor) -> torch.Tensor:
    """Intersection over union [B] of soft or boolean masks [B, H, W]; two empty masks agree."""
    a, b = mask_a.float().flatten(1), mask_b.float().flatten(1)
    union = torch.maximum(a, b).sum(dim=1)
    return torch.where(union > 0, torch.minimum(a, b).sum(dim=1) / union.clamp(min=1e-6), torch.ones_like(union))


def _check_images(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[-1] < 3 or 0 in images.shape:
        raise ValueError(f"Pictures must be [B, H, W, C] with at least 3 channels, got {tuple(images.shape)}.")
    return images.detach().float().cpu()


def _join(parts: list[Verdict]) -> Verdict:
    scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
    return Verdict(scores, torch.cat([part.mask for part in parts]), torch.cat([part.presence for part in parts]))


def _judge_chunk(images: torch.Tensor, regions: torch.Tensor | None = None) -> Verdict:
    picture = resize_to_reference(images[..., :3].permute(0, 3, 1, 2).clamp(0, 1))  # BHWC -> BCHW
    picture = smooth(picture, 0.8)
    backdrop = fit_backdrop(picture)
    off_backdrop = (picture - backdrop).norm(dim=1)
    rough = largest_part(smooth((off_backdrop > _noise_threshold(off_backdrop)).float(), 1.5) > 0.5)
    mask = _refine_silhouette(picture, off_backdrop, rough)

    region = torch.ones_like(rough).float() if regions is None else resize_to_reference(regions[:, None])[:, 0]
    inside = mask.float() * region
    presence = inside.mean(dim=(1, 2)) / region.mean(dim=(1, 2)).clamp(min=1e-6)
    present = (presence >= PRESENCE_THRESHOLD).float()[:, None]

    core = _erode(mask) * inside
    costs = _colour_costs(picture, core)
    scores = {
        "colour": _softmax_with_none(-costs / 0.03, -0.2 / 0.03) * present,
        "texture": _texture_scores(picture, core, costs.argmin(dim=1)) * present,
    }
    if regions is None:
        scores["shape"] = shape_scores(inside) * present
        scores["background"] = _background_scores(picture)
    full = F.interpolate(mask.float()[:, None], size=images.shape[1:3], mode="bilinear", antialias=True)[:, 0]
    return Verdict(scores, full, presence)


def resize_to_reference(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] with a short side of 128 pixels."""
    height, width = maps.shape[-2:]
    scale = REFERENCE_SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    return maps if size == (height, width) else F.interpolate(maps, size=size, mode="bilinear", antialias=True)


@lru_cache(maxsize=32)
def _gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """[size, size] rows of normalised Gaussians: a blur that forgets what lies outside the picture."""
    at = torch.arange(size)
    rows = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    return rows / rows.sum(dim=1, keepdim=True)


def smooth(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    height, width = maps.shape[-2:]
    return _gaussian_matrix(height, sigma) @ maps @ _gaussian_matrix(width, sigma).T


def _erode(mask: torch.Tensor) -> torch.Tensor:
    """About two pixels inside the mask, as 0 or 1; a mask without inside keeps all it has."""
    core = (smooth(mask.float(), 1.5) > 0.88) & mask
    return torch.where(core.any(dim=2).any(dim=1)[:, None, None], core, mask).float()


def _softmax_with_none(logits: torch.Tensor, none: float) -> torch.Tensor:
    """Softmax [B, n] against a further value "none of these" that is then left out."""
    return torch.cat([logits, torch.full_like(logits[:, :1], none)], dim=1).softmax(dim=1)[:, :-1]


def _palette() -> torch.Tensor:
    return torch.tensor(list(COLOURS.values())) / 255


def ring_of(maps: torch.Tensor) -> torch.Tensor:
    """The border pixels [..., N] of maps [..., H, W]."""
    rows = torch.cat([maps[..., :RING, :], maps[..., -RING:, :]], dim=-2).flatten(-2)
    columns = torch.cat([maps[..., RING:-RING, :RING], maps[..., RING:-RING, -RING:]], dim=-1).flatten(-2)
    return torch.cat([rows, columns], dim=-1)


def fit_backdrop(picture: torch.Tensor) -> torch.Tensor:
    """The background [B, C, H, W]: a plane through the border pixels that are near their median."""
    height, width = picture.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y])  # [3, H, W]
    ring, ring_basis = ring_of(picture), ring_of(basis)  # [B, C, N], [3, N]
    median = ring.median(dim=-1, keepdim=True).values
    spread = (ring - median).norm(dim=1)
    weight = (spread <= (3 * spread.median(dim=1, keepdim=True).values).clamp(0.08, 0.2)).float()
    normal = torch.einsum("bn,in,jn->bij", weight, ring_basis, ring_basis) / ring.shape[-1]
    # slopes need evidence all around; a border of many colours gives none at all
    normal = normal + torch.diag(torch.tensor([1e-6, 0.05, 0.05]))
    target = torch.einsum("bn,in,bcn->bic", weight, ring_basis, ring - median) / ring.shape[-1]
    fit = torch.linalg.solve(normal, target)
    return median[..., None] + torch.einsum("bic,ihw->bchw", fit, basis)


def _noise_threshold(off_backdrop: torch.Tensor) -> torch.Tensor:
    """How far from the background a pixel must be, [B, 1, 1].

    More than the border itself reaches, and a fifth of the boldest part: dark ink on black is a quarter.
    """
    noise = (3.5 * ring_of(off_backdrop).median(dim=1).values).clamp(0.08, 0.16)
    bold = off_backdrop.flatten(1).kthvalue(round(0.92 * off_backdrop[0].numel()), dim=1).values
    return torch.maximum(noise, 0.2 * bold)[:, None, None]


def largest_part(mask: torch.Tensor) -> torch.Tensor:
    """The connected part of `mask` around its densest place, found at half resolution."""
    half = F.max_pool2d(mask.float()[:, None], 2, ceil_mode=True)
    density = smooth(half, 3.0) * half
    part = (density == density.amax(dim=(2, 3), keepdim=True)).float() * half
    for _ in range(48):
        part = F.max_pool2d(F.max_pool2d(part, (1, 5), 1, (0, 2)), (5, 1), 1, (2, 0)) * half
    part = F.interpolate(part, scale_factor=2.0)[:, 0, : mask.shape[1], : mask.shape[2]]
    return mask & (part > 0)


def _off_segment(picture: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Distance [B, ...] of colours [B, C, ...] from the segment between start and end, both [B, C, 1...]."""
    along = end - start
    share = ((picture - start) * along).sum(dim=1, keepdim=True) / (along * along).sum(dim=1, keepdim=True)
    return (picture - start - share.clamp(-0.15, 1.2) * along).norm(dim=1)


def _colour_costs(picture: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Mean distance [B, 8] of the core's pixels from each colour, its ink and what lies between."""
    pixels, weight = picture[..., ::2, ::2].flatten(2), core[..., ::2, ::2].flatten(1)
    total = weight.sum(dim=1).clamp(min=1e-6)
    costs = []
    for colour in _palette():
        start, end = colour.view(1, 3, 1), ink_of(colour).view(1, 3, 1)
        costs.append((_off_segment(pixels, start, end).clamp(max=0.4) * weight).sum(dim=1) / total)
    return torch.stack(costs, dim=1)


def _ink_share(picture: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Where [B, H, W] each pixel lies between its shape's palette colour (0) and ink (1); colour [B]."""
    base = _palette()[colour]
    along = ink_of(base) - base
    along = along / (along * along).sum(dim=1, keepdim=True)
    return torch.einsum("bchw,bc->bhw", picture, along) - (base * along).sum(dim=1)[:, None, None]


def _refine_silhouette(picture: torch.Tensor, off_backdrop: torch.Tensor, rough: torch.Tensor) -> torch.Tensor:
    """Pixels nearer to the shape's own colour or ink than to the background: boolean [B, H, W]."""
    core = _erode(rough)
    colour = _colour_costs(picture, core * off_backdrop).argmin(dim=1)
    inked = _ink_share(picture, colour) > 0.5
    off_ink = (picture - ink_of(_palette()[colour])[..., None, None]).norm(dim=1)
    inks, bases = core * (inked & (off_ink < off_backdrop)), core * ~inked
    means = [torch.einsum("bchw,bhw->bc", picture, part) / part.sum(dim=(1, 2)).clamp(min=1.0)[:, None]
             for part in (bases, inks)]
    ink_area, base_area = inks.sum(dim=(1, 2)), bases.sum(dim=(1, 2))
    area = ink_area + base_area
    start = torch.where((base_area > 0.1 * area)[:, None], means[0], means[1])
    end = torch.where((ink_area > 0.1 * area)[:, None], means[1], means[0] * 0.97 + 0.001)
    off_shape = _off_segment(picture, start[..., None, None], end[..., None, None])
    mask = (off_shape < off_backdrop) & (off_backdrop > 0.05)
    refined = largest_part(smooth(mask.float(), 1.2) > 0.5)
    return torch.where(rough.any(dim=2).any(dim=1)[:, None, None], refined, rough)


def _background_scores(picture: torch.Tensor) -> torch.Tensor:
    """Scores [B, 8] from the border's median colour; a darker or lighter tone costs less than another hue."""
    colour, palette = ring_of(picture).median(dim=-1).values, _palette()
    power = (palette * palette).sum(dim=1)
    tone = ((colour @ palette.T + TONE_COST * power) / ((1 + TONE_COST) * power)).clamp(0.7, 1.2)
    off_hue = (colour[:, None] - tone[..., None] * palette).square().sum(dim=2)
    return _softmax_with_none(-(off_hue + TONE_COST * (tone - 1) ** 2 * power) / 0.01, -0.05 / 0.01)


def _normalise_silhouette(mask: torch.Tensor) -> torch.Tensor:
    """Silhouettes [B, H, W] moved to their centroid and scaled by their area: [B, GRID * GRID]."""
    count, height, width = mask.shape
    area = mask.sum(dim=(1, 2)).clamp(min=1.0)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    centre_x, centre_y = (mask.sum(dim=1) * x).sum(dim=1) / area, (mask.sum(dim=2) * y).sum(dim=1) / area
    cells = ((torch.arange(GRID) + 0.5) / GRID * 2 - 1) * GRID_SPAN
    at_x = (centre_x[:, None] + cells * area.sqrt()[:, None]) / width * 2 - 1
    at_y = (centre_y[:, None] + cells * area.sqrt()[:, None]) / height * 2 - 1
    grid = torch.stack([at_x[:, None, :].expand(-1, GRID, -1), at_y[:, :, None].expand(-1, -1, GRID)], dim=-1)
    return F.grid_sample(mask[:, None], grid, align_corners=False).flatten(1)


@lru_cache(maxsize=1)
def _shape_templates() -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised silhouettes [N, GRID * GRID] over turns, scales and offsets, and their shapes [N]."""
    at = (torch.arange(REFERENCE_SIDE) + 0.5) / REFERENCE_SIDE * 3 - 1.5
    u, v = at.expand(len(at), -1), at[:, None].expand(-1, len(at))
    templates, owners = [], []
    for owner, shape in enumerate(SHAPES):
        turns = [0.0] if shape in ("circle", "ring") else [math.radians(turn) for turn in range(-25, 26, 5)]
        masks = torch.stack([
            inside_shape(shape, u * math.cos(a) + v * math.sin(a), v * math.cos(a) - u * math.sin(a)).float()
            for a in turns
        ])
        upright = _normalise_silhouette(masks).view(-1, 1, GRID, GRID)
        for scale in (0.94, 1.0, 1.06):
            for shift_x in (-0.06, 0.0, 0.06):
                for shift_y in (-0.06, 0.0, 0.06):
                    theta = torch.tensor([[scale, 0, shift_x], [0, scale, shift_y]]).expand(len(turns), -1, -1)
                    grid = F.affine_grid(theta, list(upright.shape), align_corners=False)
                    templates.append(F.grid_sample(upright, grid, align_corners=False).flatten(1))
                    owners.append(torch.full((len(turns),), owner))
    return torch.cat(templates), torch.cat(owners)


def shape_scores(inside: torch.Tensor) -> torch.Tensor:
    """Best overlap [B, 8] of the normalised silhouette with each shape's templates, as scores."""
    templates, owners = _shape_templates()
    silhouette = _normalise_silhouette(inside)
    common = silhouette @ templates.T
    overlap = common / (silhouette.sum(dim=1, keepdim=True) + templates.sum(dim=1) - common).clamp(min=1e-6)
    best = torch.stack([overlap[:, owners == owner].amax(dim=1) for owner in range(len(SHAPES))], dim=1)
    return _softmax_with_none(best / 0.02, 0.68 / 0.02)


@lru_cache(maxsize=1)
def _texture_amplitudes() -> torch.Tensor:
    """Fourier amplitudes [4, 4] of the textures' ink at the waves of `_texture_scores`."""
    stripes = 2 / math.pi
    checkers = 4 / math.pi ** 2
    reach = 2 * math.pi * DOT_RADIUS / TEXTURE_PERIOD
    bessel = float(torch.special.bessel_j1(torch.tensor(reach)))
    dots = 2 * math.pi * DOT_RADIUS ** 2 / TEXTURE_PERIOD ** 2 * 2 * bessel / reach
    known = {
        "plain": [0.0, 0.0, 0.0, 0.0],
        "striped": [stripes, 0.0, 0.0, 0.0],
        "checkered": [checkers, checkers, 0.0, 0.0],
        "dotted": [0.0, 0.0, dots, dots],
    }
    return torch.tensor([known[texture] for texture in TEXTURES])


def _texture_scores(picture: torch.Tensor, core: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Scores [B, 4] from the ink's local amplitudes at two diagonal, one flat and one upright wave."""
    ink, weight = _ink_share(picture, colour)[:, ::2, ::2].clamp(-0.5, 1.5), core[:, ::2, ::2]
    window = WINDOW / 2
    cover = smooth(weight, window).clamp(min=1e-4)
    ink = (ink - smooth(ink * weight, window) / cover) * weight
    height, width = ink.shape[-2:]
    x, y = torch.arange(width) * 2.0, torch.arange(height)[:, None] * 2.0
    diagonal = 0.5 * (1 / TEXTURE_PERIOD + 1 / (math.sqrt(2) * CHECKER_CELL)) / math.sqrt(2)
    straight = 1 / TEXTURE_PERIOD
    waves = ((diagonal, diagonal), (diagonal, -diagonal), (straight, 0.0), (0.0, straight))
    trust = weight * cover
    amplitudes = []
    for wave_x, wave_y in waves:
        angle = 2 * math.pi * (wave_x * x + wave_y * y)
        energy = (smooth(ink * angle.cos(), window) ** 2 + smooth(ink * angle.sin(), window) ** 2) / cover ** 2
        amplitudes.append(2 * ((energy * trust).sum(dim=(1, 2)) / trust.sum(dim=(1, 2)).clamp(min=1e-6)).sqrt())
    found = torch.stack(amplitudes, dim=1)
    known = _texture_amplitudes()
    contrast = (found @ known.T / (known * known).sum(dim=1).clamp(min=1e-6)).clamp(0.35, 1.2)
    miss = (found[:, None] - contrast[..., None] * known).norm(dim=2)
    return (-miss ** 2 / 0.006).softmax(dim=1)
