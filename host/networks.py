"""The network inside a model, whatever is wrapped around it, and the name that people know the model by."""
from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
OVERRIDE = "optimized_attention_override"  # in transformer_options: the host's slot for another attention
# Ours in transformer_options, for one call: where tokens stand if not as the network alone has them, and whether
# features are injected outside the network.
SEQUENCE, INJECTED = "mixology_sequence", "mixology_injected"
# By the host's class of a model's configuration; a class that is not here has the name of its nearest base that is.
NAMES = {
    "SD15": "SD1.x", "SD20": "SD2.x", "SDXLRefiner": "SDXL Refiner", "SDXL": "SDXL", "SSD1B": "SSD-1B",
    "Segmind_Vega": "Segmind Vega", "KOALA_700M": "KOALA", "KOALA_1B": "KOALA", "SVD_img2vid": "Stable Video Diffusion",
    "SV3D_u": "SV3D", "Stable_Zero123": "Stable Zero123", "SD_X4Upscaler": "SD x4 Upscaler",
    "Stable_Cascade_C": "Stable Cascade", "SD3": "SD3", "StableAudio": "Stable Audio", "AuraFlow": "AuraFlow",
    "PixArtAlpha": "PixArt-Alpha", "PixArtSigma": "PixArt-Sigma", "HunyuanDiT": "HunyuanDiT", "Flux": "Flux",
    "Flux2": "Flux.2", "GenmoMochi": "Mochi", "LTXV": "LTX-Video", "LTXAV": "LTX-2", "HunyuanVideo": "HunyuanVideo",
    "HunyuanImage21": "HunyuanImage 2.1", "HunyuanVideo15": "HunyuanVideo 1.5", "CosmosT2V": "Cosmos",
    "CosmosT2IPredict2": "Cosmos-Predict2", "Anima": "Anima", "Lumina2": "Lumina 2", "ZImage": "Z-Image",
    "PixelDiTT2I": "PixelDiT", "WAN21_T2V": "Wan 2.1", "WAN22_T2V": "Wan 2.2", "WAN22_S2V": "Wan 2.2",
    "WAN22_Animate": "Wan 2.2", "WAN22_Camera": "Wan 2.2", "WAN22_WanDancer": "Wan 2.2", "Hunyuan3Dv2": "Hunyuan3D",
    "HiDream": "HiDream-I1", "HiDreamO1": "HiDream-O1", "Chroma": "Chroma", "ChromaRadiance": "Chroma Radiance",
    "ACEStep": "ACE-Step", "ACEStep15": "ACE-Step 1.5", "Omnigen2": "OmniGen2", "Boogu": "Boogu",
    "Ideogram4": "Ideogram 4", "Krea2": "Krea 2", "MageFlow": "Mage-Flow", "QwenImage": "Qwen-Image",
    "JoyImage": "JoyImage", "Kandinsky5": "Kandinsky 5", "LongCatImage": "LongCat-Image", "ErnieImage": "ERNIE-Image",
    "CogVideoX_T2V": "CogVideoX", "Lens": "Lens",
}


def find_network(model: Any) -> Any:
    """The true network of a BaseModel: a compiled one stands behind a wrapper of torch's."""
    network = model.diffusion_model
    while hasattr(network, "_orig_mod"):
        network = network._orig_mod
    return network


def is_kind(thing: Any, *names: str) -> bool:
    """Whether an object's class is, or extends, one of these of the host's, by module and name."""
    return any(f"{base.__module__}.{base.__qualname__}" in names for base in type(thing).__mro__)


def family_name(model: Any) -> str:
    """What people call a BaseModel; its class's name where that is not known."""
    config = getattr(model, "model_config", None)
    names = [NAMES[base.__name__] for base in type(config).__mro__ if base.__name__ in NAMES]
    return names[0] if names else type(model).__name__


class NamedCall:
    """The arguments of a call that the host's wrappers stand around, by name.

    Args:
        executor: what a wrapper is given to go on.
    """

    def __init__(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        signature = inspect.signature(executor.original)
        self.bound = signature.bind(*args, **kwargs)
        rest = next((name for name, parameter in signature.parameters.items() if parameter.kind is VAR_KEYWORD), "")
        self.rest = self.bound.arguments.setdefault(rest, {}) if rest else {}
        self.given = {**self.bound.arguments, **self.rest}  # by the names that networks use
        if "c_crossattn" in self.given:
            self.given["context"] = self.given["c_crossattn"]
        self.given.setdefault("transformer_options", None)

    def run(self, executor: Any, **changed: Any) -> Any:
        """Goes on with some arguments changed."""
        for name, value in changed.items():
            place = self.bound.arguments if name in self.bound.signature.parameters else self.rest
            place[name] = value
        return executor(*self.bound.args, **self.bound.kwargs)


def run_uncompiled(model: Any, transformer_options: dict[str, Any], node: str) -> AbstractContextManager[Any]:
    """Runs compiled networks as they were written, for calls whose patches a compiled one may not hear.

    The host compiles without guards on `transformer_options`: what was traced without a patch would run without it.

    Raises:
        ValueError: if something is compiled, and this PyTorch cannot be told so.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing was compiled
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if find_network(model) is not model.diffusion_model or "torch.compile" in wrappers:
        raise ValueError(
            f"{node} expected PyTorch 2.6 or newer beside a compiled model, got {torch.__version__}; update PyTorch, "
            f"or remove the node that compiles the model.")
    return nullcontext()
