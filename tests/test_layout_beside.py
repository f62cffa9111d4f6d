"""MagicMix around samplers of other packs and beside nodes that keep state, each stood in for by a few lines."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import comfy_extras.nodes_easycache as caches
import pytest
import tiny
import torch
from comfy.k_diffusion.sampling import sample_euler
from mixology.host.layout import LayoutMixSampler, Mix, make_layout, mix_latent, record_layout, sigma_window
from mixology.host.run import Schedule
from mixology.samplers.layout import mix_states
from rig import NEGATIVE, POSITIVE, SEED, mixer, run


def around(sampler: Any, latent: dict[str, Any], nu: float = 0.5, **options: Any) -> LayoutMixSampler:
    if not isinstance(sampler, comfy.samplers.Sampler):
        sampler = comfy.samplers.KSAMPLER(sampler)
    return LayoutMixSampler(sampler, make_layout(latent, SEED, "shared"), Mix(nu, 0.6, 0.3, **options))


def sample_in_float64(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
    """A solver that works in double precision and returns it."""
    x = x.double()
    for i in range(len(sigmas) - 1):
        denoised = model(x.float(), sigmas[i] * x.new_ones([len(x)]).float(), **rest["extra_args"]).double()
        x = x + (x - denoised) / sigmas[i].double() * (sigmas[i + 1] - sigmas[i]).double()
    return x


def sample_by_share_of_steps(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
    """A solver that divides by its number of steps less one."""
    for i in range(len(sigmas) - 1):
        gamma = 0.1 * (1 - i / (len(sigmas) - 2))
        hat = sigmas[i] * (1 + gamma)
        denoised = model(x, hat * x.new_ones([len(x)]), **rest["extra_args"])
        x = x + (x - denoised) / hat * (sigmas[i + 1] - hat)
    return x


def sample_past_the_end(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
    """A solver that begins by looking two sigmas ahead."""
    return sample_euler(model, x, sigmas, **rest) if sigmas[2] < sigmas[0] else x


def sample_with_a_copied_guider(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
    """A solver that reads through a shallow copy of the guider."""
    model.inner_model = copy.copy(model.inner_model)
    return sample_euler(model, x, sigmas, **rest)


def sample_with_a_copied_reader(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
    """A solver that reads through a shallow copy of what it is handed."""
    return sample_euler(copy.copy(model), x, sigmas, **rest)


def sample_with_own_cfg(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
    """A solver that sets the guider's CFG."""
    model.inner_model.cfg = 6.0
    return sample_euler(model, x, sigmas, **rest)


class OwnSampler(comfy.samplers.Sampler):
    """Euler in a class of its own, as packs write them that need more than a function."""

    def sample(self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any,
               noise: torch.Tensor, latent_image: Any = None, denoise_mask: Any = None, disable_pbar: bool = False,
               ) -> torch.Tensor:
        reader = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        reader.latent_image, reader.noise = latent_image, noise
        sampling = model_wrap.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        told = None if callback is None else lambda now: callback(now["i"], now["denoised"], now["x"], len(sigmas) - 1)
        x = sample_euler(reader, x, sigmas, {**extra_args, "denoise_mask": denoise_mask}, told, True)
        return sampling.inverse_noise_scaling(sigmas[-1], x)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("sampler", [sample_in_float64, OwnSampler()])
def test_samplers_that_return_float64_or_are_classes_of_their_own(
        models: dict[str, Any], kind: str, sampler: Any) -> None:
    """Both are Euler in another dress. An own class starts from the state only up to its noise's float32."""
    model, latent = models[kind], tiny.latent(1, 6, 8)
    for sigmas in (tiny.sigmas_of(model, steps=7), tiny.sigmas_of(model, steps=7)[:-1]):
        mixed = run(model, around(sampler, latent), latent, sigmas)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, run(model, mixer("euler", latent), latent, sigmas), rtol=0, atol=5e-5)
        start = sigma_window(model.model, sigmas, 0.6, 0.3).start
        bare = sampler if isinstance(sampler, comfy.samplers.Sampler) else comfy.samplers.KSAMPLER(sampler)
        assert torch.equal(run(model, around(sampler, latent, 1.0), latent, sigmas),
                           run(model, bare, latent, sigmas[start:]))


def test_a_class_of_its_own_records_and_shows_progress(model: Any) -> None:
    latent, seen = tiny.latent(), []
    sigmas = tiny.sigmas_of(model, steps=12)
    run(model, around(OwnSampler(), latent), latent, sigmas, callback=lambda i, *rest: seen.append(i))
    assert seen == list(range(len(sigmas) - 1 - sigma_window(model.model, sigmas, 0.6, 0.3).start))


def test_a_class_of_its_own_cannot_fill_a_noise_mask_or_be_read_through(model: Any) -> None:
    masked, sigmas = {**tiny.latent(), "noise_mask": torch.ones(1, 64, 64)}, tiny.sigmas_of(model)
    with pytest.raises(ValueError, match="one of the host's kind under a noise mask, got OwnSampler, .* choose"):
        run(model, around(OwnSampler(), masked), masked, sigmas)
    with pytest.raises(ValueError, match="variant diffusers expects .*got OwnSampler, which .*or variant paper"):
        run(model, around(OwnSampler(), tiny.latent(), variant="diffusers"), tiny.latent(), sigmas)
    start = sigma_window(model.model, sigmas, 0.6, 0.3).start
    assert torch.equal(run(model, around(OwnSampler(), masked, 1.0), masked, sigmas),
                       run(model, OwnSampler(), masked, sigmas[start:]))


@pytest.mark.parametrize("sampler", [sample_by_share_of_steps, sample_past_the_end])
def test_samplers_that_make_no_single_step_leave_it_to_euler(model: Any, sampler: Any) -> None:
    def sample_expected(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
        return (sample_euler if len(sigmas) == 2 else sampler)(model, x, sigmas, **rest)

    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=12)
    assert torch.equal(run(model, around(sampler, latent), latent, sigmas),
                       run(model, around(sample_expected, latent), latent, sigmas))


@pytest.mark.parametrize(("made", "text"), [
    (lambda x: None, r"back from the sampler .*broken.*, got NoneType; choose another"),
    (lambda x: x[:, :2], r"a latent of the shape \(1, 4, 8, 8\) back .*, got \(1, 2, 8, 8\); choose another"),
    (lambda x: x * float("nan"), r"numbers back from the sampler .*broken.* from sigma .*, got NaN or infinite ones; "),
])
@pytest.mark.parametrize("nu", [0.5, 1.0])
def test_samplers_that_return_no_state(model: Any, made: Callable[[torch.Tensor], Any], text: str, nu: float) -> None:
    def sample_broken(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> Any:
        return made(x)

    with pytest.raises(ValueError, match=text):
        run(model, around(sample_broken, tiny.latent(), nu), tiny.latent(), tiny.sigmas_of(model))


@pytest.mark.parametrize("sampler", [sample_with_a_copied_guider, sample_with_a_copied_reader])
@pytest.mark.parametrize("options", [{}, {"nu": 1.0}, {"variant": "diffusers"}])
def test_what_a_sampler_gets_can_be_copied(model: Any, options: dict[str, Any], sampler: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model)
    assert torch.equal(run(model, around(sampler, latent, **options), latent, sigmas),
                       run(model, around(sample_euler, latent, **options), latent, sigmas))


@pytest.mark.parametrize("options", [{}, {"nu": 1.0}, {"variant": "diffusers"}])
def test_what_a_sampler_writes_to_the_guider_acts(model: Any, options: dict[str, Any]) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model)
    guider = tiny.cfg_guider(model, POSITIVE, NEGATIVE)
    written = run(model, around(sample_with_own_cfg, latent, **options), latent, sigmas, guider=guider)
    asked = run(model, around(sample_euler, latent, **options), latent, sigmas,
                guider=tiny.cfg_guider(model, POSITIVE, NEGATIVE, 6.0))
    assert torch.equal(written, asked) and guider.cfg == 6.0


def test_wrappers_of_the_sampling_run_meet_the_hosts_own_guider(model: Any) -> None:
    met: list[Any] = []

    def wrap(executor: Any, guider: Any, *rest: Any) -> Any:
        met.append(guider)
        return executor(copy.copy(guider), *rest)

    patched, latent, sigmas = model.clone(), tiny.latent(), tiny.sigmas_of(model)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, "test", wrap)
    assert torch.equal(run(patched, mixer("euler", latent), latent, sigmas),
                       run(model, mixer("euler", latent), latent, sigmas))
    assert len(met) == 1 and type(met[0]) is comfy.samplers.CFGGuider


def with_easy_cache(model: Any) -> Any:
    return caches.EasyCacheNode.execute(model, 0.5, 0.0, 1.0, False)[0]


def with_lazy_cache(model: Any) -> Any:
    return caches.LazyCacheNode.execute(model, 0.5, 0.0, 1.0, False)[0]


def with_momentum(model: Any) -> Any:
    """A guidance that keeps a running mean of its direction in transformer_options through a run."""
    patched = model.clone()

    def guide(args: dict[str, Any]) -> torch.Tensor:
        state = args["model_options"]["transformer_options"]
        direction = args["cond_denoised"] - args["uncond_denoised"]
        state["mean_direction"] = direction if "mean_direction" not in state else (
            0.5 * state["mean_direction"] + 0.5 * direction)
        return args["denoised"] + state["mean_direction"]

    patched.set_model_sampler_post_cfg_function(guide)
    return patched


@pytest.mark.parametrize("company", [with_easy_cache, with_lazy_cache, with_momentum])
def test_nodes_that_keep_state_through_a_run(model: Any, company: Callable[[Any], Any]) -> None:
    """In pieces exactly as in one run that mixes by itself."""
    latent, sigmas = tiny.latent(1, 8, 8), tiny.sigmas_of(model, steps=14)
    window, layout = sigma_window(model.model, sigmas, 0.6, 0.3), make_layout(latent, SEED, "shared")
    states = layout.bind(model.model, sigmas, latent["samples"])

    def sample_mixed_in_one_run(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
        for i in range(window.stop - window.start):
            x = mix_states(sample_euler(model, x, sigmas[i:i + 2], **rest), states.state(window.start + i + 1),
                           torch.tensor(0.5))
        return sample_euler(model, x, sigmas[window.stop - window.start:], **rest)

    patched = company(model)
    mixed = run(patched, around(sample_euler, latent), latent, sigmas)
    assert torch.equal(mixed, run(patched, around(sample_mixed_in_one_run, latent, 1.0), latent, sigmas))
    assert not torch.allclose(mixed, run(model, mixer("euler", latent), latent, sigmas), atol=1e-4)
    assert torch.equal(mixed, run(patched, around(sample_euler, latent), latent, sigmas))  # nothing stays


def test_functions_that_a_sampler_adds_do_not_pile_up(model: Any) -> None:
    """A sampler that writes its own post-CFG function into the options has one of them in every piece."""
    counts: list[int] = []

    def sample_listening(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
        options = rest["extra_args"]["model_options"]
        options.setdefault("sampler_post_cfg_function", []).append(lambda args: args["denoised"])
        counts.append(len(options["sampler_post_cfg_function"]))
        return sample_euler(model, x, sigmas, **rest)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    run(patched, around(sample_listening, tiny.latent()), tiny.latent(), tiny.sigmas_of(model, steps=12))
    assert set(counts) == {2} and len(counts) > 3


def test_a_sampler_that_reads_past_the_reader_cannot_mix_what_it_reads(model: Any) -> None:
    def sample_past_the_reader(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **rest: Any) -> torch.Tensor:
        options = rest["extra_args"]["model_options"]
        for i in range(len(sigmas) - 1):
            denoised = model.inner_model(x, sigmas[i] * x.new_ones([len(x)]), model_options=options, seed=0)
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    latent = tiny.latent()
    with pytest.raises(ValueError, match="variant diffusers expects a sampler that reads the model inside the window"):
        run(model, around(sample_past_the_reader, latent, variant="diffusers"), latent, tiny.sigmas_of(model, steps=12))


@pytest.mark.parametrize("name", ["heun", "dpm_2", "dpmpp_sde", "seeds_2", "dpm_adaptive", "euler"])
def test_recorded_layout_between_its_sigmas(model: Any, name: str) -> None:
    """Variant diffusers with solvers that look between grid points: linear in sigma between recorded states."""
    empty, schedule = {"samples": torch.zeros(1, 4, 8, 8)}, Schedule(SEED, 20, 3.0, "euler", "ddim_uniform")
    layout, _ = record_layout(model, POSITIVE, NEGATIVE, empty, schedule=schedule, k_max=0.6, k_min=0.3, finish=False)
    sigmas, read = tiny.sigmas_of(model, steps=20), []
    sampler = LayoutMixSampler(comfy.samplers.sampler_object(name), layout, Mix(0.0, 0.6, 0.3, variant="diffusers"))
    counted = model.clone()

    def listen(apply: Any, given: dict[str, Any]) -> Any:
        read.append((float(given["timestep"][0]), given["input"][:1].clone()))
        return apply(given["input"], given["timestep"], **given["c"])

    counted.set_model_unet_function_wrapper(listen)
    assert run(counted, sampler, empty, sigmas).isfinite().all()
    rising = sorted(layout.states)
    inside = [(sigma, x) for sigma, x in read if rising[0] * 1.0001 < sigma <= rising[-1] * 1.0001]
    assert len(inside) >= 5
    for sigma, x in inside:  # nu 0 reads the layout itself
        above = next(i for i, recorded in enumerate(rising) if recorded >= sigma * 0.99999)
        low, high = rising[max(above - 1, 0)], rising[above]
        expected = torch.lerp(layout.states[low], layout.states[high], (sigma - low) / (high - low))
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_a_recorded_layout_ends_where_it_was_recorded(model: Any) -> None:
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    layout, _ = record_layout(
        model, POSITIVE, NEGATIVE, empty, schedule=Schedule(SEED, 20, 3.0, "euler", "ddim_uniform"), k_max=0.6,
        k_min=0.3, finish=False)
    for variant, k_max, k_min in (("paper", 0.7, 0.3), ("paper", 0.6, 0.1), ("diffusers", 0.6, 0.1)):
        sampler = LayoutMixSampler(
            comfy.samplers.sampler_object("heun"), layout, Mix(0.5, k_max, k_min, variant=variant))
        with pytest.raises(ValueError, match="recorded at sigmas .* has no state at .* a window inside the recorded"):
            run(model, sampler, empty, tiny.sigmas_of(model, steps=20))


@pytest.mark.parametrize(("recorder", "reader", "text"), [
    ("flow", "eps", "recorded with a flow model, but this one is an eps model"),
    ("flow", "v", "recorded with a flow model, but this one is a v model"),
    ("eps", "flow", "recorded with an eps model, but this one is a flow model"),
])
def test_a_layout_recorded_with_another_kind_of_model(models: dict[str, Any], recorder: str, reader: str, text: str,
                                                      ) -> None:
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    layout, _ = record_layout(
        models[recorder], POSITIVE, NEGATIVE, empty, schedule=Schedule(SEED, 8, 3.0, "euler", "normal"), k_max=0.6,
        k_min=0.3, finish=False)
    sampler = LayoutMixSampler(comfy.samplers.sampler_object("euler"), layout, Mix(0.5, 0.6, 0.3))
    with pytest.raises(ValueError, match=text):
        run(models[reader], sampler, empty, tiny.sigmas_of(models[reader], "normal", 8))


@pytest.mark.parametrize(("recorder", "reader"), [("eps", "flow"), ("flow", "eps")])
@pytest.mark.parametrize(("steps", "scheduler"), [(8, "ddim_uniform"), (2, "normal"), (40, "linear_quadratic")])
def test_the_kind_is_named_before_steps_and_scheduler(models: dict[str, Any], recorder: str, reader: str, steps: int,
                                                      scheduler: str) -> None:
    """Whatever the other kind's schedule looks like, a window without a step for instance, is no fault of it."""
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    layout, _ = record_layout(
        models[recorder], POSITIVE, NEGATIVE, empty, schedule=Schedule(SEED, 8, 3.0, "euler", "normal"), k_max=0.6,
        k_min=0.3, finish=False)
    with pytest.raises(ValueError, match=f"recorded with an? {recorder} model, but this one is an? {reader} model, "):
        mix_latent(models[reader], POSITIVE, NEGATIVE, layout, schedule=Schedule(SEED, steps, 3.0, "euler", scheduler),
                   mix=Mix(0.5, 0.6, 0.55))


def test_another_shift_is_named(models: dict[str, Any]) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    empty, schedule = {"samples": torch.zeros(1, 4, 8, 8)}, Schedule(SEED, 8, 3.0, "euler", "normal")
    layout, _ = record_layout(
        models["flow"], POSITIVE, NEGATIVE, empty, schedule=schedule, k_max=0.6, k_min=0.3, finish=False)
    other = ModelSamplingSD3().patch(models["flow"], 1.0)[0]
    with pytest.raises(ValueError, match="noise is at sigma 0.75 halfway, but this one's is at 0.5, .* the same shift"):
        mix_latent(other, POSITIVE, NEGATIVE, layout, schedule=schedule, mix=Mix(0.5, 0.6, 0.3))


def test_eps_and_v_models_share_their_states(models: dict[str, Any]) -> None:
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    layout, _ = record_layout(
        models["eps"], POSITIVE, NEGATIVE, empty, schedule=Schedule(1, 8, 3.0, "euler", "normal"), k_max=0.6,
        k_min=0.3, finish=False)
    sampler = LayoutMixSampler(comfy.samplers.sampler_object("euler"), layout, Mix(0.5, 0.6, 0.3))
    assert run(models["v"], sampler, empty, tiny.sigmas_of(models["v"], "normal", 8)).isfinite().all()


def test_a_layout_mix_around_another() -> None:
    latent = tiny.latent()
    with pytest.raises(ValueError, match="expects a solver, got another Layout Mix Sampler, .*; wire only one"):
        around(mixer("euler", latent), latent)
