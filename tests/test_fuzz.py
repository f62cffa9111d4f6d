"""Every node with inputs at random, in bounds and odd: a finite result or one sentence, and inputs as they were."""
from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import comfy.samplers
import pytest
import tiny
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from mixology.host import demo
from torch import Tensor

ROUNDS = 24  # a node
SIGMAS = torch.tensor([6.0, 2.0, 0.5, 0.0])
CAPTION = "a striped red star on a blue background"
LATENT = {"samples": torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
SMALL = {"steps": 4, "width": 96, "height": 96}  # what grows with these is not under test
TEXTS = {
    "text": [CAPTION, "", "star " * 90, "\u661f", "lone \ud800 surrogate"],
    "values": ["0.1, 0.3", "0:1:5", "", "a", "0:1", "1:2:1e9", "\ud800"], "labels": ["", "a\nb", "\u661f"],
    "values_2": ["", "1, 2", "cfg = 1:2:3", "a, 1"], "values_3": ["", "euler, ddim", "1:"],
    **{name: ["", "a", "a\nb\nc", "\ud800"] for name in ("across", "down", "settings")},
    **{name: ["", CAPTION, "star " * 90, "\ud800"] for name in ("source_text", "left_text", "right_text")},
    "caption": [CAPTION, "", "a zebra", "\u661f", "lone \ud800 surrogate"],
    "scales": ["star = -1", "red star = [0, 2]", "", "zebra = 1", "star = nan", "\u661f = 1", "\ud800 = 1"],
    "nu_per_image": ["", "0.1, 0.9", "0.1 0.2 0.3 0.4 0.5", "nan", "\u661f"],
    "cfg_per_style": ["", "5, 7.5", "1 1 1 1 1", "-1", "\ud800"],
    "filename_prefix": ["fuzz/a", "%date:yyyy%", "../out", "x" * 400, "nul\x00", ".hidden/a", "\ud800"],
    "name": ["shapes", "sketch", "none", "", "\ud800"],
}


@pytest.fixture(scope="module")
def models() -> list[Any]:
    model = demo.load_model(demo.shipped_file("shapes"))
    return [model, ModelSamplingDiscrete().patch(model, "v_prediction", False)[0],
            ModelSamplingSD3().patch(model, 3.0)[0]]


@pytest.fixture(scope="module")
def clip() -> Any:
    return demo.load_clip(demo.shipped_file("text"))


class Maker:
    """Inputs of every type, at random."""

    def __init__(self, seed: int, models: list[Any], clip: Any, pack: dict[str, Any]) -> None:
        self.dice = random.Random(seed)
        self.models, self.clip, self.pack = models, clip, pack
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def model(self) -> Any:
        return self.dice.choice([self.models[0], *self.models])

    def conditioning(self) -> list[Any]:
        text = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(self.dice.choice([CAPTION, "", "star " * 90])))
        entry, = text
        odd = [[], [[torch.zeros_like(entry[0]), entry[1]]], [entry, [entry[0] * 0.5, {}]],
               [[entry[0], {**entry[1], "start_percent": 0.2, "end_percent": 0.6}]],
               [[entry[0], {**entry[1], "area": (4, 4, 0, 0), "strength": 1.0}]]]
        return self.dice.choice([*[text] * 12, *odd])

    def latent(self) -> dict[str, Any]:
        batch, height, width = self.dice.choice([(1, 8, 8), (2, 9, 7), (3, 8, 12)])
        latent: dict[str, Any] = {"samples": self.noise(batch, 4, height, width) * 2 - 1}
        kind = self.dice.randrange(12)
        if kind > 8:
            return dict(LATENT)
        if kind == 0:
            latent["samples"] = torch.zeros_like(latent["samples"])
        elif kind == 1:
            latent["noise_mask"] = self.mask()
        elif kind == 2:
            latent["batch_index"] = list(range(batch))
        elif kind == 3:
            latent["samples"] = self.noise(batch, self.dice.choice([3, 16]), height, width)
        return latent

    def mask(self) -> Tensor:
        mask = self.noise(self.dice.choice([1, 1, 2, 3]), 16, 12)
        odd = [mask > 0.5, mask.double(), torch.zeros_like(mask), torch.full_like(mask, float("nan")), mask[0], -mask,
               mask * 1e4, mask[:, None]]
        return self.dice.choice([*[mask] * 8, *odd])

    def image(self) -> Tensor:
        image = self.noise(self.dice.choice([1, 2]), 32, self.dice.choice([24, 32]), 3)
        return self.dice.choice([image, image, image[..., :1], torch.cat([image, image[..., :1]], -1),
                                 torch.full_like(image, float("nan"))])

    def ours(self, node: str, **chosen: Any) -> Any:
        """The first output of one of our nodes; of its own inputs the odd ones are tried again."""
        for _ in range(50):
            try:
                return self.call(node, chosen)[0][0]
            except ValueError:
                continue
        raise AssertionError(f"{node} takes nothing")

    def experts(self) -> Any:
        """One or two."""
        chain: Any = None
        for _ in range(self.dice.choice([1, 2, 2])):
            chain = self.ours("MixologyExpert", experts=chain, model=self.models[0])
        return chain

    def guider(self) -> Any:
        """One of ours that has sampled `LATENT`, or another."""
        if self.dice.random() < 0.3:
            return tiny.cfg_guider(self.models[0], self.conditioning(), self.conditioning())
        guider = self.ours("MixologySaliencyGuider", outside=0)
        with contextlib.suppress(ValueError):
            guider.sample(self.noise(1, 4, 8, 8), LATENT["samples"], comfy.samplers.sampler_object("euler"), SIGMAS,
                          disable_pbar=True, seed=1)
        return guider

    def value(self, socket: Any) -> Any:
        kind, name = socket.get_io_type(), socket.id
        if kind in ("INT", "FLOAT"):
            high = min(socket.max, SMALL.get(name, socket.max))
            low = min(socket.min, high)
            inner = self.dice.randint(low, high) if kind == "INT" else self.dice.uniform(low, high)
            return self.dice.choice([inner, inner, *[min(socket.default, high)] * 4, low, high])
        if kind == "BOOLEAN":
            return self.dice.random() < 0.5
        if kind == "STRING":
            return self.dice.choice([*TEXTS[name][:1] * 4, *TEXTS[name]])
        if kind == "COMBO":
            return self.dice.choice([*socket.options, *TEXTS["name"]] if name == "name" else list(socket.options))
        makers: dict[str, Callable[[], Any]] = {
            "MODEL": self.model, "CONDITIONING": self.conditioning, "LATENT": self.latent, "MASK": self.mask,
            "IMAGE": self.image, "CLIP": lambda: self.clip, "CLIP_VISION": demo.load_clip_vision,
            "SAMPLER": lambda: comfy.samplers.sampler_object(self.dice.choice(comfy.samplers.SAMPLER_NAMES)),
            "MIXOLOGY_LAYOUT": lambda: self.ours("MixologyLayoutNoise"),
            "MIXOLOGY_TRAJECTORY": lambda: self.ours("MixologyInvert"),
            "MIXOLOGY_EXPERTS": self.experts, "GUIDER": self.guider,
            "MIXOLOGY_MIXER": lambda: self.ours("MixologyMixerImage", mixer=None)}
        return makers[kind]()

    def inputs(self, node: str, chosen: dict[str, Any] | None = None) -> dict[str, Any]:
        found, chosen = {}, chosen or {}
        for socket in self.pack[node].define_schema().inputs:
            if socket.id in chosen or (socket.optional and self.dice.random() < 0.4):
                continue
            if hasattr(socket, "template"):
                names = [f"{socket.template.prefix}{i}" for i in range(self.dice.choice([2, 2, 3]))]
                found[socket.id] = {name: self.conditioning() for name in names}
            else:
                found[socket.id] = self.value(socket)
        if self.pack[node].define_schema().is_input_list:
            found = {name: [value] * self.dice.choice([1, 1, 2]) for name, value in found.items()}
        return found

    def call(self, node: str, chosen: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a node returns, and what it was given."""
        given = {**self.inputs(node, chosen), **chosen}
        return self.pack[node].execute(**given).result or (), given


def tensors_of(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in what nodes hand to each other."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) and depth < 6:
        for part in value.values():
            yield from tensors_of(part, depth + 1)
    elif isinstance(value, list | tuple) and depth < 6:
        for part in value:
            yield from tensors_of(part, depth + 1)


def use(output: Any, maker: Maker) -> Any:
    """What a few steps of the host make of a MODEL, SAMPLER or GUIDER; other outputs are shown as they are."""
    positive = [[maker.noise(1, 77, 128), {}]]
    model, solver, guider = maker.models[0], comfy.samplers.sampler_object("euler"), None
    if hasattr(output, "model_options") and hasattr(output, "clone"):
        model = output
    elif hasattr(output, "max_denoise"):
        solver = output
    elif hasattr(output, "set_cfg"):
        guider = output
    else:
        return output
    guider = guider or tiny.cfg_guider(model, positive, positive, 2.0)
    return guider.sample(maker.noise(1, 4, 8, 8), LATENT["samples"], solver, SIGMAS, disable_pbar=True, seed=1)


def is_same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


NODES = [
    "MixologyLayoutNoise", "MixologyLayoutFromPrompt", "MixologyLayoutMixSampler", "MixologyLayoutMixKSampler",
    "MixologyTokenScale", "MixologyAttentionMerge", "MixologyGradientMask", "MixologyEpsilonMergeGuider",
    "MixologyCycleSampler", "MixologyBlendPrompts", "MixologyInvert", "MixologyFeatureInjection",
    "MixologyTrajectoryStart", "MixologyCocktailKSampler", "MixologySaveTrajectory", "MixologyLoadTrajectory",
    "MixologyExpert", "MixologySaliencyGuider", "MixologySaliencyMaps", "MixologyMixerImage", "MixologyMixerText",
    "MixologyMixerConditioning", "MixologyImageMetrics", "MixologyClipMetrics", "MixologySweep", "MixologyLabelledGrid",
    "MixologyDemoCheckpoint", "MixologyDemoPicture"]


def test_every_node_is_tried(pack: dict[str, Any]) -> None:
    assert set(NODES) == set(pack)


@pytest.mark.parametrize("node", NODES)
def test_a_node_answers_or_says_why_not(node: str, models: list[Any], clip: Any, pack: dict[str, Any]) -> None:
    answered = 0
    for round_ in range(ROUNDS):
        maker = Maker(1000 * NODES.index(node) + round_, models, clip, pack)
        given = maker.inputs(node)
        before = [(tensor, tensor.clone()) for tensor in tensors_of(given)]
        try:
            results = pack[node].execute(**given).result or ()
            shown = [use(output, maker) for output in results]
        except ValueError as error:
            sentence = str(error)
            assert len(sentence.splitlines()) == 1 and sentence.endswith("."), (round_, sentence)
            sentence.encode("ascii" if "\u661f" not in str(given) else "utf-8")
        else:
            answered += 1
            assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(shown)), (round_, given)
        assert all(is_same(tensor, copy) for tensor, copy in before), (round_, "an input was changed")
    assert answered or node == "MixologyLoadTrajectory", "no round was answered: the inputs are all odd"
