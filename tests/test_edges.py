"""Ends of windows, what pieces of a run are given, what is dropped and what is refused: the edges of the host room."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import comfy.sd
import pytest
import tiny
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from mixology.attention_patches.rows import holds_text
from mixology.host import layout as magicmix
from mixology.host.cycle import CycleSampler, make_noise_source
from mixology.host.embeddings import in_file
from mixology.host.factors import TokenScale
from mixology.host.injection import KEY, wrap_calls
from mixology.host.layout import LayoutMixSampler, Mix, make_layout, mix_latent, record_layout
from mixology.host.run import MOST_SEED, Schedule, draw_noise, output_latent, run_guider
from mixology.host.spatial import confine
from mixology.host.trajectory_format import fit_shapes
from mixology.samplers.layout import Window, sample_layout_mix
from mixology.samplers.mixer import crop_span
from rig import NEGATIVE, POSITIVE, SEED, mixer, run, start_index
from safetensors.torch import save_file
from torch import Tensor

# ----------------------------------------------------------------------------------------------- layout mixing

def test_nothing_is_mixed_into_the_finished_picture() -> None:
    """A window that reaches sigma 0: the last step's own result stands."""
    asked: list[int] = []

    def layout_state(index: int) -> Tensor:
        asked.append(index)
        return torch.full((1, 1, 1, 1), 100.0)

    result = sample_layout_mix(
        lambda x, i, j: torch.full_like(x, j), layout_state, [3.0, 1.0, 0.0], Window(0, 2), torch.tensor(0.5))
    assert float(result) == 2.0 and asked == [0, 1]


def test_a_recorded_layout_is_checked_before_the_run(model: Any) -> None:
    """For every state that a window will ask for, not only its first."""
    empty, schedule = {"samples": torch.zeros(1, 4, 8, 8)}, Schedule(3, 20, 3.0, "euler", "ddim_uniform")
    layout, _ = record_layout(model, POSITIVE, NEGATIVE, empty, schedule=schedule, k_max=0.6, k_min=0.3, finish=False)
    counted, calls = tiny.count_evaluations(model)
    with pytest.raises(ValueError, match="has no state at"):
        mix_latent(counted, POSITIVE, NEGATIVE, layout, schedule=schedule, mix=Mix(0.5, 0.6, 0.1))
    assert not calls


class Stop(Exception):
    """Ends a run whose arguments are known."""


@pytest.mark.parametrize("node", ["mix", "record"])
def test_the_guider_gets_the_nodes_seed(model: Any, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    given: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> Any:
        given.update(kwargs)
        raise Stop

    monkeypatch.setattr(magicmix, "run_guider", note)
    latent, schedule = tiny.latent(), Schedule(23, 5, 3.0, "euler_ancestral", "normal")
    with pytest.raises(Stop):
        if node == "mix":
            mix_latent(model, POSITIVE, NEGATIVE, make_layout(latent, 1, "shared"), schedule=schedule,
                       mix=Mix(0.5, 0.6, 0.3))
        else:
            record_layout(model, POSITIVE, NEGATIVE, latent, schedule=schedule, k_max=0.6, k_min=0.3, finish=True)
    assert given["seed"] == 23 and torch.equal(given["noise"], draw_noise(latent, 23))


def test_every_piece_sees_the_grid_of_the_whole_run(model: Any) -> None:
    """From the window's start on: other nodes read their place in it."""
    seen: list[Tensor] = []
    euler = comfy.samplers.ksampler("euler").sampler_function

    def listening(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["extra_args"]["model_options"]["transformer_options"]["sample_sigmas"])
        return euler(*args, **kwargs)

    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=20)
    sampler = LayoutMixSampler(
        comfy.samplers.KSAMPLER(listening), make_layout(latent, SEED, "shared"), Mix(0.5, 0.6, 0.3))
    run(model, sampler, latent, sigmas)
    start = start_index(model, sigmas, 0.6)
    assert len(seen) > 3 and start > 0 and all(torch.equal(grid, sigmas[start:]) for grid in seen)


def test_ddim_fills_a_noise_mask_with_one_noise_in_all_pieces(model: Any) -> None:
    """Its own, as in a whole run: what the model reads where nothing is painted is the same."""
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=20)
    latent["noise_mask"] = torch.zeros(1, 64, 64)
    latent["noise_mask"][..., 32:] = 1

    def read(sampler: Any, grid: Tensor) -> dict[float, Tensor]:
        found: dict[float, Tensor] = {}

        def note(apply_model: Any, arguments: dict[str, Any]) -> Any:
            found[round(float(arguments["timestep"][0]), 4)] = arguments["input"][..., :4].clone()
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        patched = model.clone()
        patched.set_model_unet_function_wrapper(note)
        run(patched, sampler, latent, grid)
        return found

    pieces = read(mixer("ddim", latent), sigmas)
    whole = read(comfy.samplers.sampler_object("ddim"), sigmas[start_index(model, sigmas, 0.6):])
    assert pieces.keys() == whole.keys() and len(pieces) > 5
    later = sorted(pieces, reverse=True)[1:]  # the first state is the sampler's start, filled alike
    assert all(torch.allclose(pieces[sigma], whole[sigma], atol=1e-5) for sigma in later)


# ----------------------------------------------------------------------------------------------------- latents

def test_what_belonged_to_another_size_or_batch_is_dropped() -> None:
    latent = {**tiny.latent(2), "batch_index": [4, 5], "noise_mask": "kept", "downscale_ratio_spacial": 8}
    same = output_latent(latent, torch.zeros(2, 4, 8, 8))
    assert same["batch_index"] == [4, 5] and same["noise_mask"] == "kept" and "downscale_ratio_spacial" not in same
    assert "batch_index" not in output_latent(latent, torch.zeros(3, 4, 8, 8))
    assert "batch_index" in latent


# ---------------------------------------------------------------------------------------------- other techniques

@pytest.mark.parametrize(("key", "words"), [("control", "a ControlNet"), ("hooks", "hooks"), ("gligen", "GLIGEN"),
                                            ("additional_models", "extra models")])
@pytest.mark.parametrize("place", ["source", "negative"])
def test_a_source_prompt_is_plain(key: str, words: str, place: str) -> None:
    marked = [[POSITIVE[0][0], {key: object()}]]
    source, negative = (marked, NEGATIVE) if place == "source" else (POSITIVE, marked)
    with pytest.raises(ValueError, match=f"The {place} prompt .* plain conditioning, got {words} in it"):
        CycleSampler(source, 2.0, 0.1, 0, negative)


def test_a_styles_own_mask_counts_inside_its_share() -> None:
    own, share, like = torch.rand(1, 4, 6), torch.rand(4, 6), torch.zeros(2, 4, 4, 6)
    plain, masked = confine([{"text": 1}, {"text": 2, "mask": own, "strength": 0.5}], share, like)
    assert torch.equal(plain["mask"], share[None]) and torch.equal(masked["mask"], own * share)
    assert (plain["text"], masked["text"], masked["strength"]) == (1, 2, 0.5)


@pytest.mark.parametrize(("side", "start", "share", "expected"), [
    (10, 0.26, 0.5, (3, 8)), (10, 0.24, 0.5, (2, 7)), (7, 0.5, 0.25, (4, 5)), (10, 0.99, 0.01, (9, 10)),
    (3, 0.0, 0.01, (0, 1)), (10, 0.3, 0.26, (3, 6))])
def test_crops_are_rounded_to_the_nearest_pixel(side: int, start: float, share: float, expected: tuple[int, int],
                                                ) -> None:
    assert crop_span(side, start, share) == expected


@pytest.mark.parametrize(("sigma", "inside"), [(9.0, True), (9.001, False), (2.0, True), (1.999, False), (5.0, True)])
def test_both_ends_belong_to_the_window_of_a_scale(sigma: float, inside: bool) -> None:
    scale = TokenScale(torch.tensor([[1.0, -2.0]]), 0.25, 0.75)
    sampling = SimpleNamespace(percent_to_sigma={0.25: 9.0, 0.75: 2.0}.__getitem__)
    factors = scale.factors_at(sampling, torch.tensor([sigma]), (1, [0]), {})
    assert factors.tolist() == ([[1.0, -2.0]] if inside else [[1.0, 1.0]])


def test_injection_is_the_innermost_wrapper_of_its_kind() -> None:
    """Others see what it puts into a call; one of an earlier call is replaced."""
    wrapper = SimpleNamespace(kind="diffusion_model")
    options = {"transformer_options": {"wrappers": {
        "diffusion_model": {KEY: ["an old one"], "other": ["theirs"]}, "apply_model": {"more": ["theirs"]}}}}
    made = wrap_calls(options, wrapper)["transformer_options"]["wrappers"]
    assert list(made["diffusion_model"].items()) == [("other", ["theirs"]), (KEY, [wrapper])]
    assert made["apply_model"] == {"more": ["theirs"]}
    assert list(options["transformer_options"]["wrappers"]["diffusion_model"]) == [KEY, "other"]


# ----------------------------------------------------------------------------------------------------- the host

@pytest.mark.parametrize("shown", [True, False])
def test_a_run_shows_a_bar_where_the_host_does(model: Any, monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_ENABLED", shown)
    guider, given = tiny.cfg_guider(model, POSITIVE, NEGATIVE), {}
    plain = guider.sample
    monkeypatch.setattr(guider, "sample", lambda *args, **kwargs: given.update(kwargs) or plain(*args, **kwargs))
    latent = tiny.latent()
    run_guider(guider, comfy.samplers.sampler_object("euler"), tiny.sigmas_of(model, steps=2), latent,
               noise=draw_noise(latent, 1), seed=1)
    assert given["disable_pbar"] is not shown


@pytest.mark.parametrize(("seed", "same"), [(None, 0), (0, 0), (5, 5), (MOST_SEED, -1)])
def test_steps_draw_the_hosts_noise(seed: int | None, same: int) -> None:
    """No seed counts as 0; the largest one, to which the host would add 1, as the one before 0."""
    x, high, low = torch.zeros(1, 4, 3, 5), torch.tensor(2.0), torch.tensor(1.0)
    assert torch.equal(make_noise_source(x, seed)(high, low), default_noise_sampler(x, seed=same)(high, low))


@pytest.mark.parametrize(("names", "tower", "expected"), [
    (["conditioner.embedders.0.transformer.text_projection.weight"], "clip_l", False),
    (["text_encoders.clip_l.transformer.text_projection.weight"], "clip_l", True),
    (["conditioner.embedders.1.model.text_projection"], "clip_l", False),
    (["conditioner.embedders.1.model.text_projection"], "clip_g", True),
    (["text_encoders.clip_g.transformer.text_projection.weight"], "clip_g", True)])
def test_whose_projection_a_checkpoint_brings(tmp_path: Path, names: list[str], tower: str, expected: bool) -> None:
    """In a checkpoint of two towers a projection named as OpenCLIP's is CLIP-G's, never CLIP-L's."""
    save_file({name: torch.ones(1) for name in names}, tmp_path / "two.safetensors")
    loader = comfy.sd.load_checkpoint_guess_config
    patcher = SimpleNamespace(cached_patcher_init=(loader, (str(tmp_path / "two.safetensors"),)))
    assert in_file(SimpleNamespace(patcher=patcher, cond_stage_model=object()), tower) is expected


@pytest.mark.parametrize(("tokens", "strength", "held"), [(3, 1.0, True), (7, 0.5, True), (2, 1.0, False)])
def test_a_text_is_known_at_any_strength_where_a_row_begins_with_it(tokens: int, strength: float, held: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    text, rest = (torch.randn(1, count, 2, generator=generator) for count in (3, 6))
    context = torch.cat([torch.cat([text * strength, rest], dim=1), torch.cat([rest, text], dim=1)])[:, :tokens]
    assert holds_text(context, text) is held
    assert not holds_text(context.flip(1), text) and not holds_text(context.repeat(1, 1, 2), text)


@pytest.mark.parametrize(("shape", "fits"), [((8, 6), True), ((1, 8, 6), True), ((2, 1, 8, 6), True),
                                             ((2, 1, 1, 8, 6), True), ((6,), False), ((2, 1, 1, 1, 8, 6), False)])
def test_a_stored_noise_mask_has_the_dimensions_of_one(shape: tuple[int, ...], fits: bool) -> None:
    picture = (2, 4, 8, 6)
    shapes = {"sigmas": (3,), "states": (3, *picture), "samples": picture, "end": picture, "noise_mask": shape}
    assert fit_shapes(shapes, {"levels": [[1.0, 0.0]] * 3, "batch_index": [0, 1]}) is fits
