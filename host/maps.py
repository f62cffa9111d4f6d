"""The winners of a guider's runs, found again by the latents that a run gave."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_BYTES = 2 ** 26  # of winners; the latest run is always kept


@dataclass(frozen=True)
class Kept:
    """A finished run: winners [steps, B, ..., H, W] in bytes, fingerprints of what it gave and of what it took."""

    winners: torch.Tensor
    given: tuple[bytes, ...]
    taken: bytes


class RunMaps:
    """The latest runs of a guider and its copies. A host runs a node once for each item of a list, with one guider."""

    def __init__(self) -> None:
        self.runs: list[Kept] = []

    def keep(self, winners: torch.Tensor, given: Sequence[torch.Tensor], taken: torch.Tensor) -> None:
        """Remember a run and forget the oldest ones beyond `MAX_BYTES`.

        Args:
            winners: of each step, on the CPU; given: the latents that came out; taken: the one that went in.
        """
        self.runs.append(Kept(winners, tuple(fingerprint(latent) for latent in given), fingerprint(taken)))
        while len(self.runs) > 1 and sum(run.winners.numel() for run in self.runs) > MAX_BYTES:
            self.runs.pop(0)

    def find(self, latent: torch.Tensor) -> torch.Tensor | None:
        """Winners of the latest run that gave this latent, else of the latest that took it."""
        wanted = fingerprint(latent)
        for run in reversed(self.runs):
            if wanted in run.given:
                return run.winners
        return next((run.winners for run in reversed(self.runs) if run.taken == wanted), None)


def fingerprint(latent: torch.Tensor) -> bytes:
    """What tells a latent from another: shape and values, in float32."""
    values = latent.detach().to("cpu", torch.float32).contiguous()
    name = hashlib.blake2b(str(tuple(values.shape)).encode(), digest_size=16)
    name.update(values.numpy().tobytes())
    return name.digest()
