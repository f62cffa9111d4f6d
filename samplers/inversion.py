"""Inversion of a picture into noise, and the prompt it is read with (Ditail, arXiv 2312.08873).

The host's deterministic solvers follow dx/dsigma = (x - D(x, sigma)) / sigma for eps, v and flow models alike. An
inversion takes its Euler steps upward. It needs the slope at a state that it does not know yet, and reads it from the
lower state: at the upper level's sigma (rule `ditail`: the paper's, and DDIM inversion as commonly published, which
hands the network the lower latent and the upper time step) or at the lower level's own (rule `euler`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from einops import repeat

from .levels import MOST_STEPS, Level
from .wording import legible

RULES = ("ditail", "euler")
LONGEST_REPEAT = 16  # times the longer prompt


def reading_index(step: int, rule: str) -> int:
    """Grid index whose sigma the model is read at; sigma 0 has no slope, so the first step is read above it."""
    return step + 1 if rule == "ditail" else max(step, 1)


def rescale(now: Level, end: Level) -> float:
    """Factor between states of two levels of the same unit variance.

    A network of a variance preserving path sees the same input before and after, which is what the paper feeds it; on
    other paths (flow) this is the same rule after the change of variables that makes them variance preserving.
    """
    return math.hypot(end.signal, end.noise) / math.hypot(now.signal, now.noise)


def sample_inversion(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    x: torch.Tensor,
    sigmas: Sequence[float],
    levels: Sequence[Level],
    rule: str,
    report: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Follow a picture up a rising grid, one evaluation a step.

    Args:
        predict: `predict(x, i)` is the clean estimate of state x at grid index i, [B, ...].
        x: the state at the first sigma, [B, ...].
        sigmas, levels: the grid, one more than steps; rising, above 0 but for its first.
        rule: "ditail" or "euler".
        report: `report(i, denoised, x)` is told the estimate and the new state after each step.

    Returns:
        The state at the last sigma, [B, ...].
    """
    for i in range(len(sigmas) - 1):
        read = reading_index(i, rule)
        seen = x * rescale(levels[i], levels[read])
        denoised = predict(seen, read).to(x)
        x = x + (seen - denoised) * ((sigmas[i + 1] - sigmas[i]) / sigmas[read])
        report(i, denoised, x)
    return x


def check_settings(steps: int, rule: str) -> None:
    """Raises ValueError if steps or rule is out of range."""
    if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps expects a number from 1 to {MOST_STEPS}, got {steps}; the paper uses 50.")
    if rule not in RULES:
        raise ValueError(f"rule expects one of {', '.join(RULES)}, got {legible(rule)}; choose {RULES[0]}.")


def check_weights(alpha: float, beta: float) -> None:
    """Raises ValueError if a weight of a blend is no number."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not math.isfinite(value):
            raise ValueError(f"{name} expects a number, got {value:g}; set it between -20 and 20.")


def blend_embeddings(
    positive: torch.Tensor, negative: torch.Tensor | None, alpha: float, beta: float,
) -> torch.Tensor:
    """alpha E(positive) - beta E(negative) (Ditail, section 3); no negative counts as zero.

    Texts of unequal length, [B, L, C], are repeated to their least common multiple as the host does in a batch, which
    leaves what cross-attention makes of either one exactly as it was. With beta 0 nothing is repeated.

    Raises:
        ValueError: if the embeddings are of different text encoders, or repeat too often.
    """
    if negative is None or beta == 0:
        return alpha * positive
    if positive.ndim != negative.ndim or positive.shape[-1] != negative.shape[-1]:
        raise ValueError(
            f"Blend Prompts expects both prompts from one text encoder, got embeddings of {positive.shape[-1]} and "
            f"{negative.shape[-1]} channels; encode both with the same CLIP.")
    if 1 not in (positive.shape[0], negative.shape[0]) and positive.shape[0] != negative.shape[0]:
        raise ValueError(
            f"Blend Prompts expects one negative for all or one for each of the batch of {positive.shape[0]}, got "
            f"{negative.shape[0]}; encode one negative prompt.")
    if positive.ndim == 3:
        lengths = positive.shape[1], negative.shape[1]
        common = math.lcm(*lengths)
        if common > LONGEST_REPEAT * max(lengths):
            raise ValueError(
                f"Blend Prompts expects prompts whose token counts fit into each other, got {lengths[0]} and "
                f"{lengths[1]}; word both about equally long.")
        positive, negative = (
            repeat(text, "b length c -> b (times length) c", times=common // length)
            for text, length in zip((positive, negative), lengths))
    return alpha * positive - beta * negative.to(positive)
