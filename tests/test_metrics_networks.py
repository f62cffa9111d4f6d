"""LPIPS's networks against a float64 reference, and SSIM and PSNR against what scikit-image gave."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from mixology.metrics.image import layer_distance, lpips, psnr, ssim
from mixology.metrics.lpips import TRUNKS, Network, find_trunk, find_weights, join_network, make_features
from mixology.metrics.report import draw_table, show_figure

State = dict[str, torch.Tensor]
# by convolution: number in torchvision's file, channels out and in, side, step, padding; and whether a pooling comes
# before, and whether LPIPS reads its map
VGG = [(0, 64, 3, 3, 1, 1, 0, 0), (2, 64, 64, 3, 1, 1, 0, 1), (5, 128, 64, 3, 1, 1, 1, 0), (7, 128, 128, 3, 1, 1, 0, 1),
       (10, 256, 128, 3, 1, 1, 1, 0), (12, 256, 256, 3, 1, 1, 0, 0), (14, 256, 256, 3, 1, 1, 0, 1),
       (17, 512, 256, 3, 1, 1, 1, 0), (19, 512, 512, 3, 1, 1, 0, 0), (21, 512, 512, 3, 1, 1, 0, 1),
       (24, 512, 512, 3, 1, 1, 1, 0), (26, 512, 512, 3, 1, 1, 0, 0), (28, 512, 512, 3, 1, 1, 0, 1)]
ALEX = [(0, 64, 3, 11, 4, 2, 0, 1), (3, 192, 64, 5, 1, 2, 1, 1), (6, 384, 192, 3, 1, 1, 1, 1),
        (8, 256, 384, 3, 1, 1, 0, 1), (10, 256, 256, 3, 1, 1, 0, 1)]
PLANS = {"VGG16": (VGG, 2), "AlexNet": (ALEX, 3)}


def network_state(name: str, seed: int = 0) -> State:
    """Random weights under torchvision's names, with a tensor of the classifier that LPIPS does not need."""
    g = torch.Generator().manual_seed(seed)
    state: State = {"classifier.0.weight": torch.zeros(2, 2)}
    for number, out, into, side, *_ in PLANS[name][0]:
        state[f"features.{number}.weight"] = torch.randn(out, into, side, side, generator=g) * (
            2 / (into * side * side)) ** 0.5
        state[f"features.{number}.bias"] = 0.1 * torch.randn(out, generator=g)
    return state


def linear_state(name: str, seed: int = 1) -> State:
    """Weights of channels under the lpips package's names."""
    g = torch.Generator().manual_seed(seed)
    widths = [out for _, out, *_, read in PLANS[name][0] if read]
    return {f"lin{stage}.model.1.weight": torch.rand(1, width, 1, 1, generator=g) for stage, width in enumerate(widths)}


def whole_state(name: str) -> State:
    """A whole LPIPS module's own file: the network in slices, and the weights under two names."""
    slices, place = {}, 1
    for number, *_, read in PLANS[name][0]:
        slices[number] = place
        place += read
    state = {f"net.slice{slices[int(key.split('.')[1])]}.{key.removeprefix('features.')}": value
             for key, value in network_state(name).items() if key.startswith("features")}
    state |= linear_state(name)
    return {**state, **{key.replace("lin", "lins.", 1): value for key, value in linear_state(name).items()},
            "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}


def joined(name: str) -> Network:
    found = join_network([linear_state(name), network_state(name)])
    assert isinstance(found, Network)
    return found


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, step: int, padding: int) -> np.ndarray:
    """[C, H, W] in float64, by the definition."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (1, 2))[:, ::step, ::step]
    return np.einsum("chwij,ocij->ohw", windows, weight, optimize=True) + bias[:, None, None]


def reference_distance(name: str, pair: Sequence[np.ndarray]) -> float:
    """LPIPS of two pictures [H, W, 3] in float64."""
    plan, pool = PLANS[name]
    state = {key: value.double().numpy() for key, value in network_state(name).items()}
    maps: list[list[np.ndarray]] = []
    for picture in pair:
        x = (2 * picture.transpose(2, 0, 1) - 1 - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array(
            [0.458, 0.448, 0.450])[:, None, None]
        maps.append([])
        for number, _, _, _, step, padding, pooled, read in plan:
            if pooled:
                x = np.lib.stride_tricks.sliding_window_view(x, (pool, pool), (1, 2))[:, ::2, ::2].max((3, 4))
            x = convolve(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], step, padding)
            x = np.maximum(x, 0)
            if read:
                maps[-1].append(x / (np.sqrt((x ** 2).sum(0)) + 1e-10))
    weights = [value.double().numpy().ravel() for value in linear_state(name).values()]
    return sum(float((((a - b) ** 2) * w[:, None, None]).sum(0).mean()) for a, b, w in zip(*maps, weights))


@pytest.mark.parametrize("name", PLANS)
def test_lpips_equals_a_float64_reference(name: str) -> None:
    x = torch.rand(1, 39, 34, 3, generator=torch.Generator().manual_seed(2))
    y = (x + 0.3 * torch.rand(1, 39, 34, 3, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    network = joined(name)
    result = lpips(x, y, make_features(network, torch.device("cpu")), network.weights)
    expected = reference_distance(name, [picture[0].double().numpy() for picture in (x, y)])
    assert float(result) == pytest.approx(expected, rel=1e-5) and expected > 1e-3
    assert float(lpips(x, x, make_features(network, torch.device("cpu")), network.weights)) == 0


@pytest.mark.parametrize("name", PLANS)
def test_networks_are_known_by_their_published_names(name: str) -> None:
    """In two files, or in the one of a whole module, to which a prefix may be put."""
    trunk = find_trunk(network_state(name))
    assert trunk is not None and trunk[0].name == name and find_weights(network_state(name)) is None
    prefixed = {f"loss.{key}": value for key, value in whole_state(name).items()}
    for state in (whole_state(name), prefixed):
        found = join_network([state])
        assert isinstance(found, Network) and found.trunk.name == name
        assert all(torch.equal(a, b) for a, b in zip(found.weights, joined(name).weights))
        assert torch.equal(found.convolutions[0][0], network_state(name)["features.0.weight"])


def test_torchvisions_names_are_these() -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        for name, make in (("VGG16", models.vgg16), ("AlexNet", models.alexnet)):
            trunk = find_trunk(make(weights=None).state_dict())
            assert trunk is not None and trunk[0].name == name
        assert find_trunk(models.vgg19(weights=None).state_dict()) is None


def test_what_is_missing_is_told() -> None:
    vgg, alex = network_state("VGG16"), network_state("AlexNet")
    assert join_network([]) == "VGG16 and its linear weights"
    assert join_network([vgg]) == join_network([vgg, linear_state("AlexNet")]) == "the linear weights of VGG16"
    assert join_network([linear_state("AlexNet")]) == "AlexNet"
    cut = {key: value for key, value in vgg.items() if "28" not in key}
    assert join_network([cut, linear_state("VGG16")]) == "VGG16"
    both = join_network([alex, linear_state("AlexNet"), vgg, linear_state("VGG16")])
    assert isinstance(both, Network) and both.trunk.name == "VGG16"


@pytest.mark.parametrize(("name", "side"), [("VGG16", 15), ("AlexNet", 30)])
def test_pictures_too_small_for_a_network(name: str, side: int) -> None:
    read = make_features(joined(name), torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"at least {side + 1}x{side + 1} pixels for {name}, got 40x{side}; use"):
        read(torch.zeros(1, 3, side, 40))
    assert min(read(torch.zeros(1, 3, side + 1, 40))[-1].shape) > 0
    assert {trunk.name: trunk.smallest for trunk in TRUNKS}[name] == side + 1


def test_a_layer_in_strips_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(2, 2, 5, 9, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    weights = torch.rand(5)
    whole = layer_distance(x, y, weights)
    monkeypatch.setattr("mixology.metrics.image.LARGEST_STRIP", 2 * 5 * 7 * 2)
    assert layer_distance(x, y, weights).tolist() == pytest.approx(whole.tolist(), rel=1e-12)


# -------------------------------------------------------------------------------------------- scikit-image

def whole_numbers(seed: int, height: int, width: int, amount: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures in 256 levels that are the same on every machine."""
    n = np.arange(height * width * 3, dtype=np.int64).reshape(1, height, width, 3)
    x = (n * n * 7 + n * 13 + seed * 101) % 256
    y = np.clip(x + ((n * 31 + n * n * 3 + seed) % (2 * amount + 1)) - amount, 0, 255)
    return torch.from_numpy(x / 255.0), torch.from_numpy(y / 255.0)


@pytest.mark.parametrize(("case", "similarity", "ratio"), [
    ((1, 32, 40, 40), 0.9540135775570359, 21.163968634913715),
    ((2, 17, 23, 90), 0.8141491106988741, 14.744832658002839),
    ((3, 64, 11, 10), 0.9969228548410088, 32.70560248372318),
])
def test_values_are_those_of_scikit_image(case: tuple[int, int, int, int], similarity: float, ratio: float) -> None:
    """scikit-image 0.26: structural_similarity(x, y, data_range=1.0, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=2) and peak_signal_noise_ratio(x, y, data_range=1.0), to 1e-12; of the
    host's float32 pictures to 1e-7."""
    x, y = whole_numbers(*case)
    assert float(ssim(x, y)) == pytest.approx(similarity, abs=1e-12)
    assert float(psnr(x, y)) == pytest.approx(ratio, abs=1e-12)
    assert float(ssim(x.float(), y.float())) == pytest.approx(similarity, abs=1e-7)
    assert float(psnr(x.float(), y.float())) == pytest.approx(ratio, abs=1e-5)


# -------------------------------------------------------------------------------------------------- tables

@pytest.mark.parametrize(("value", "shown"), [
    (0.12345, "0.1235"), (-9.87654, "-9.8765"), (12.345, "12.35"), (1234.5, "1234"), (float("inf"), "inf"),
    (-float("inf"), "-inf"), (float("nan"), "nan"), (None, "")])
def test_a_figure_is_short(value: Any, shown: str) -> None:
    assert show_figure(value) == shown


def test_columns_stand_below_their_heads() -> None:
    table = draw_table(["picture", "L2", "PSNR dB"], [("1", [3.5, 20.0]), ("mean", [3.5, None])])
    assert table.split("\n") == ["picture      L2  PSNR dB", "1        3.5000    20.00", "mean     3.5000         "]
