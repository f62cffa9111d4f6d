"""MagicFusion in the host: a guider that lets several models paint one picture, each where it is most salient."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ..samplers.fusion import (
    blend_experts,
    check_settings,
    compare_saliency,
    draw_winners,
    measure_response,
    pick_winners,
    split_winners,
)
from ..samplers.wording import format_picture, legible
from .conds import check_sigmas, is_active, wants_pairs
from .experts import Expert, ExpertGuider, is_same_prompt, may_share
from .fusion_strip import overlay_maps
from .maps import RunMaps
from .own_copies import Copies, check_shared, separate_weights
from .protocols import Guider, Sampler
from .run import find_cell

NODE = "The Saliency Fusion Guider"
UNCONDS = ("own", "first")
POST_CFG = "sampler_post_cfg_function"
CFG_ONE = "disable_cfg1_optimization"

Options = dict[str, Any]


@dataclass
class Run:
    """State of one sampling run.

    Attributes:
        shape: of the winners, [B, ..., H, W].
        window: sigmas between which the experts are fused, as the host writes a prompt's time range.
        leaders: for each expert the first one of those that it is evaluated with, in one call of the model.
        rows: for each expert the first one that evaluates the same positive, and the same negative.
        latest: winners of the last evaluation; winners: those of each step.
        denoised: what the sampler reported last, in model space.
    """

    shape: tuple[int, ...]
    window: dict[str, float]
    leaders: list[int]
    rows: list[tuple[int, int]] = field(default_factory=list)
    latest: torch.Tensor | None = None
    winners: dict[int, torch.Tensor] = field(default_factory=dict)
    denoised: torch.Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What a sampler asks of its model: a clean estimate of x at a sigma.

    Attributes:
        x: [B, C, ..., H, W]; timestep: sigma of each batch item, [B].
        options: of the run, as the sampler hands them on; added: post-CFG functions that the sampler put in itself.
    """

    x: torch.Tensor
    timestep: torch.Tensor
    options: Options
    added: list[Any]
    seed: int | None


class SaliencyGuider(ExpertGuider):
    """MagicFusion (arXiv 2303.13126): the expert with the highest saliency supplies the noise of each pixel.

    This guider is expert 0, whose model, CFG and prompts samplers and other nodes see; the runs of the other experts
    are opened around its own. Inside the window every expert is evaluated with its positive and negative; experts on
    one model in one call, equal prompts once. Outside it, or where only one expert has something to say, or where all
    are the same, one is evaluated, as the host's CFGGuider does.

    Saliency is measured on what the model answers, before any function of other nodes; those act on their own expert's
    guidance. Functions that a sampler adds for itself see the fused prediction.

    Models that share a checkpoint and patch it unlike get weights of their own where memory allows.

    A copy (copy.copy) shares the other experts and the maps, and may be given prompts, a model or options of its own.

    Args:
        experts: two or more.
        blur: side of the box filter on the response, in latent pixels at a shorter side of 64.
        softness: 0 takes the winner; more blends with weights softmax(log saliency / softness).
        start_percent, end_percent: the window on expert 0's own time axis, 0 at pure noise.
        outside: the expert that paints outside the window.
        saliency_uncond: "own" unconditional of each expert, or that of the "first" (the published code).

    Raises:
        ValueError: on fewer than two experts, or settings out of range.
    """

    def __init__(
        self, experts: Sequence[Expert], blur: float, softness: float, start_percent: float, end_percent: float,
        outside: int, saliency_uncond: str,
    ):
        check_count(experts)
        check_settings(blur, softness, start_percent, end_percent)
        check_choices(saliency_uncond, outside, len(experts))
        models = separate_weights([expert.model for expert in experts])
        experts = [replace(expert, model=model) for expert, model in zip(experts, models)]
        super().__init__(experts[0])
        self.blur, self.softness, self.saliency_uncond = blur, softness, saliency_uncond
        self.start_percent, self.end_percent, self.outside = start_percent, end_percent, outside
        self.others: list[ExpertGuider] = []
        for expert in experts[1:]:
            shares_model = any(expert.model is other.source for other in self.experts)
            self.others.append(ExpertGuider(expert, shares_model))
        self.shares_model = any(other.source is self.source for other in self.others)
        self.run: Run | None = None
        self.winners: torch.Tensor | None = None  # of the last run, [steps, B, ..., H, W] in bytes
        self.maps = RunMaps()

    @property
    def experts(self) -> list[ExpertGuider]:
        """All experts in order. Made when asked: a list of its own would keep this guider alive in itself."""
        return [self, *self.others]

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Sampler, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None, callback: Callable[..., None] | None = None,
        disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:
        if getattr(noise, "is_nested", False) or noise.ndim < 4:
            raise ValueError(
                "The Saliency Fusion Guider expects an image or video latent, got one without height and width; use "
                "CFG Guider for this model."
            )
        if sigmas.shape[-1] == 0:
            return latent_image
        check_sigmas(sigmas, NODE)
        run = self.run = Run((len(noise), *noise.shape[2:]), self._find_window(), self._share())
        self.winners = None

        def report(step: int, *state: Any) -> None:
            if run.latest is not None:
                run.winners[step] = run.latest
            run.denoised = state[0]
            if callback is not None:
                callback(step, *state)

        proceed: Callable[[], torch.Tensor] = partial(
            super().sample, noise, latent_image, sampler, sigmas=sigmas, denoise_mask=denoise_mask, callback=report,
            disable_pbar=disable_pbar, seed=seed)
        for expert in self.others:
            proceed = partial(expert.run_around, proceed, noise, latent_image, sigmas=sigmas,
                              denoise_mask=denoise_mask, seed=seed)
        try:
            result = proceed()
            self._keep(run, result, latent_image)
            return result
        finally:
            self.run, self.prediction = None, None
            for own in self.experts:
                own.followers = ()

    def _share(self) -> list[int]:
        """Decide which experts are evaluated together; each of the others gets ControlNets and hooks of its own.

        Raises:
            ValueError: where two would disturb each other; see `check_shared`.
        """
        experts = self.experts
        leaders = [next(i for i, leader in enumerate(experts[:n + 1]) if leader is own or may_share(leader, own))
                   for n, own in enumerate(experts)]
        for leader in set(leaders):
            together = [own for own, index in zip(experts, leaders) if index == leader]
            experts[leader].followers = together[1:]
            copies: Copies = {}
            for own in together:
                if leader > 0:
                    own.copy_prompts(copies)
                elif own is not self:
                    own.original_conds = own.own_conds
        check_shared(experts)
        return leaders

    def _keep(self, run: Run, result: torch.Tensor, latent_image: torch.Tensor) -> None:
        """Keep the winners of a finished run for the latents that the host's sampler nodes make of it."""
        if not run.winners:
            return
        self.winners = torch.stack([run.winners[step] for step in sorted(run.winners)]).cpu()
        given = [result]
        if run.denoised is not None:
            given.append(self.model_patcher.model.process_latent_out(run.denoised.cpu()))
        self.maps.keep(self.winners, given, latent_image)

    def _find_window(self) -> dict[str, float]:
        if self.start_percent <= 0.0 and self.end_percent >= 1.0:
            return {}
        sampling = self.model_patcher.get_model_object("model_sampling")
        return {"timestep_start": sampling.percent_to_sigma(self.start_percent),
                "timestep_end": sampling.percent_to_sigma(self.end_percent)}

    def _match_rows(self, leaders: list[int]) -> list[tuple[int, int]]:
        """Which expert evaluates each expert's positive and negative; only known once the host made them ready."""
        def first(n: int, name: str) -> int:
            return next(i for i in range(n + 1) if leaders[i] == leaders[n] and is_same_prompt(
                experts[i].conds[name], experts[n].conds[name]))

        experts = self.experts
        return [(first(n, "positive"), first(n, "negative")) for n in range(len(experts))]

    def _choose(self, run: Run, timestep: torch.Tensor) -> list[int]:
        """The experts to evaluate at this sigma."""
        if not is_active([run.window], timestep):
            return [self.outside]
        run.rows = run.rows or self._match_rows(run.leaders)
        if len({(*rows, own.cfg, own.temperature) for rows, own in zip(run.rows, self.experts)}) == 1:
            return [0]
        every = range(len(self.experts))
        return [n for n in every if is_active(self.experts[n].conds["positive"], timestep)] or list(every)

    def outer_predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: Options | None = None, seed: int | None = None,
    ) -> torch.Tensor:
        """As `predict_noise`: the wrappers around an expert's predictions go around its own, not around the fusion."""
        return self.predict_noise(x, timestep, model_options, seed)

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: Options | None = None, seed: int | None = None,
    ) -> torch.Tensor:
        """The fused denoised, [B, C, ..., H, W]."""
        run, passed = self.run, model_options or {}
        if run is None:
            raise ValueError("The Saliency Fusion Guider expects to be asked during sampling, got no run; use sample.")
        own = self.model_options.get(POST_CFG, [])
        added = [function for function in passed.get(POST_CFG, []) if not any(function is other for other in own)]
        request = Request(x, timestep, passed, added=added, seed=seed)
        chosen = self._choose(run, timestep)
        if len(chosen) == 1:
            winners = torch.full((len(x), *x.shape[2:]), chosen[0], dtype=torch.uint8, device=x.device)
            result = self._predict_alone(self.experts[chosen[0]], request)
        else:
            for group in self._group(chosen, run.leaders):
                self._predict_together(group, run, request)
            saliency = self._measure(chosen, timestep)
            winners = torch.tensor(chosen, dtype=torch.uint8, device=x.device)[pick_winners(saliency)]
            result = self._fuse(chosen, saliency, request)
        if winners.shape == run.shape:  # some samplers ask for another size midway
            run.latest = winners
        return result

    def _group(self, chosen: list[int], leaders: list[int]) -> list[list[int]]:
        """The chosen experts by whom they are evaluated with; those whose weights are present first."""
        groups = [[n for n in chosen if leaders[n] == leader] for leader in sorted(set(leaders))]
        return sorted([group for group in groups if group],
                      key=lambda group: not self.experts[leaders[group[0]]].is_present())

    def _options_for(self, expert: ExpertGuider, request: Request) -> Options:
        """Options of an expert's own run, without the functions that the sampler added to those of expert 0.

        One object for the whole run, as a sampler's: nodes keep their state in it.
        """
        passed, added = request.options, request.added
        if expert is self:
            return {**passed, POST_CFG: [function for function in passed[POST_CFG] if function not in added]} if (
                added) else passed
        options, given = expert.run_options, passed.get("transformer_options", {})
        if "sample_sigmas" in given:  # a sampler that runs in pieces sets its own
            options["transformer_options"]["sample_sigmas"] = given["sample_sigmas"]
        wants_both = passed.get(CFG_ONE, False) and not self.model_options.get(CFG_ONE, False)
        options[CFG_ONE] = expert.model_options.get(CFG_ONE, False) or wants_both
        return options

    def _predict_alone(self, expert: ExpertGuider, request: Request) -> torch.Tensor:
        """An expert's guided denoised, with the sampler's functions behind its own."""
        options = self._options_for(expert, request)
        if request.added:
            options = {**options, POST_CFG: [*options.get(POST_CFG, []), *request.added]}
        predict = partial(comfy.samplers.CFGGuider.predict_noise, expert)
        return expert.wrap(predict, request.x, request.timestep, options=options, seed=request.seed)

    def _predict_together(self, group: list[int], run: Run, request: Request) -> None:
        """Evaluate a group of experts in one call and guide each; every one keeps its prediction."""
        leader = self.experts[run.leaders[group[0]]]
        options = self._options_for(leader, request)
        if len(group) > 1 and wants_pairs(options):  # a node that a wrapper or sampler put there
            for n in group:
                self._predict_together([n], run, request)
            return
        # each prompt once: cond, uncond, more, since patches of other packs read position 0 as cond
        rows = list(dict.fromkeys(
            row for n in group for row in (("positive", run.rows[n][0]), ("negative", run.rows[n][1]))))

        def predict(x: torch.Tensor, timestep: torch.Tensor, options: Options, seed: int | None = None) -> torch.Tensor:
            prompts = [self.experts[n].conds[name] for name, n in rows]
            negative = [name == "negative" for name, _ in rows]
            found = dict(zip(rows, leader.evaluate(prompts, negative, x, timestep, options=options)))
            return [self.experts[n].guide(
                found["positive", run.rows[n][0]], found["negative", run.rows[n][1]], x, timestep,
                options=options if self.experts[n] is leader else self._options_for(self.experts[n], request),
            ) for n in group][0]

        # wrappers only where the group is one expert
        guided = leader.wrap(predict, request.x, request.timestep, options=options, seed=request.seed)
        self.experts[group[0]].latest().guided = guided

    def _measure(self, chosen: list[int], timestep: torch.Tensor) -> torch.Tensor:
        """Logarithm of the chosen experts' saliency, [N, B, ..., H, W]."""
        experts = [self.experts[n] for n in chosen]
        unconds = [own.latest().uncond for own in experts]
        if self.saliency_uncond == "first":
            unconds = unconds[:1] * len(experts)
        responses = [measure_response(own.latest().cond, uncond, timestep, own.cfg)
                     for own, uncond in zip(experts, unconds)]
        return compare_saliency(responses, [own.temperature for own in experts], self.blur)

    def _fuse(self, chosen: list[int], saliency: torch.Tensor, request: Request) -> torch.Tensor:
        """The chosen experts' guided predictions in one, behind the functions that the sampler added."""
        predictions = [self.experts[n].latest() for n in chosen]

        def blend(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return blend_experts(values, saliency, self.softness)

        result = blend([own.guided for own in predictions])
        for function in request.added:
            result = function({
                "denoised": result, "cond": self.conds["positive"], "uncond": self.conds["negative"],
                "cond_scale": self.cfg, "model": self.inner_model, "sigma": request.timestep,
                "model_options": request.options, "input": request.x,
                "cond_denoised": blend([own.shown_cond for own in predictions]),
                "uncond_denoised": blend([own.shown_uncond for own in predictions])})
        return result


def check_count(experts: Sequence[Expert]) -> None:
    """Raises ValueError on fewer than two experts."""
    if len(experts) < 2:
        raise ValueError(
            f"The Saliency Fusion Guider expects two experts or more, got {len(experts)}; connect the experts of one "
            f"Fusion Expert to the next."
        )


def check_choices(saliency_uncond: str, outside: int, experts: int) -> None:
    """Raises ValueError on an unknown unconditional, or an expert outside the window that is none of them."""
    if saliency_uncond not in UNCONDS:
        raise ValueError(f"saliency_uncond expects own or first, got {legible(saliency_uncond)}; pick one of them.")
    if not 0 <= outside < experts:
        raise ValueError(
            f"outside expects the number of an expert, 0 to {experts - 1}, got {outside}; lower it or connect more "
            f"experts."
        )


def show_maps(
    guider: Guider, latent: dict[str, Any], image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each expert won in the guider's run that made a latent, step by step.

    Args:
        latent: a LATENT that came out of the sampling node, also one of a list.
        image: an IMAGE of it, which the colours are then laid over.

    Returns:
        IMAGE [steps * B, H, W, 3] at the picture's size, a colour for each expert, and MASK [experts * steps * B, h, w]
        at the latent's size, expert after expert. A video's frames count as images.

    Raises:
        ValueError: for another kind of guider, before it has run, and for a latent or image that no run of it made.
    """
    if not isinstance(guider, SaliencyGuider):
        raise ValueError(
            f"Saliency Maps expects a guider from Saliency Fusion Guider, got {type(guider).__name__}; connect "
            f"that one."
        )
    samples = latent["samples"]
    winners = guider.maps.find(samples)
    if winners is None:
        raise ValueError(explain_missing(guider, samples))
    factor = guider.model_patcher.get_model_object("latent_format").spacial_downscale_ratio
    maps = draw_winners(winners, factor)
    return (maps if image is None else overlay_maps(maps, image, samples)), split_winners(winners, len(guider.experts))


def explain_missing(guider: SaliencyGuider, samples: torch.Tensor) -> str:
    """Why no run of the guider made a latent, and what to do."""
    if not guider.maps.runs:
        return ("Saliency Maps expects a guider that has sampled, got one without a finished run; connect the latent "
                "that it sampled, and run the sampling node again (for instance with another seed).")
    found, wanted = tuple(guider.maps.runs[-1].winners.shape[1:]), (len(samples), *samples.shape[2:])
    if found != wanted:
        cell = find_cell(guider.model_patcher.model)
        sizes = [f"{count} image(s) of {format_picture((1, 1, *sides), cell)}" for count, *sides in (found, wanted)]
        return (f"Saliency Maps expects the latent of the guider's last run, with {sizes[0]}, got {sizes[1]}; connect "
                f"that latent, and use one guider for each sampling node.")
    return ("Saliency Maps expects a latent as it came out of the sampling node, got one that none of the "
            f"{len(guider.maps.runs)} run(s) that the guider remembers has made; connect an output of that node "
            "directly, or run it again (for instance with another seed).")
