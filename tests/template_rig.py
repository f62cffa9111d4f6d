"""Runs a template's graph in this process, each node by the host's own execution, tiny models in place of loaders."""
from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import comfy.sd
import execution
import torch
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import flux as flux_text
from comfy.text_encoders import qwen_image, z_image
from comfy_api.internal import _ComfyNodeInternal
from comfy_api.latest import _io
from encoders import fill_text
from families_modern import FLUX, KLEIN, QWEN, Z_IMAGE
from family import build
from titles import template_path
from torch import Tensor
from workflow import Workflow

SIDE = 64  # of a picture, in pixels
TEXT = 32  # width of a text token
QWEN3 = {"hidden_size": TEXT, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL = {"qwen3_4b_model_config": {**QWEN3, "num_hidden_layers": 28},  # Klein reads the layers up to 27
         "qwen25_7b_model_config": {**QWEN3, "num_hidden_layers": 1},
         "clip_l_model_config": {"hidden_size": TEXT, "intermediate_size": 32, "num_attention_heads": 2,
                                 "num_hidden_layers": 3},
         "t5xxl_model_config": {"d_model": TEXT, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}}
NETWORKS = {  # a family's class and configuration, by the file
    "z_image_turbo_bf16.safetensors": ("ZImage", {**Z_IMAGE, "cap_feat_dim": TEXT}),
    "flux-2-klein-4b.safetensors": ("Flux2", {**KLEIN, "context_in_dim": 3 * TEXT}),
    "flux1-dev.safetensors": ("Flux", {**FLUX, "context_in_dim": TEXT, "vec_in_dim": TEXT}),
    "qwen_image_fp8_e4m3fn.safetensors": ("QwenImage", {**QWEN, "joint_attention_dim": TEXT}),
}
ENCODERS = {  # by the type that the loader is set to
    "lumina2": (z_image.ZImageTokenizer, z_image.te()), "flux2": (flux_text.KleinTokenizer, flux_text.klein_te()),
    "flux": (flux_text.FluxTokenizer, flux_text.FluxClipModel),
    "qwen_image": (qwen_image.QwenImageTokenizer, qwen_image.QwenImageTEModel),
}


class TinyVae:
    """Averages squares of pixels; the latent's first three channels are the picture's."""

    def __init__(self, channels: int, side: int, video: bool) -> None:
        self.channels, self.side, self.video = channels, side, video

    def encode(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), self.side)  # [B, H, W, C] -> [B, C, h, w]
        latent = small.repeat(1, -(-self.channels // 3), 1, 1)[:, :self.channels] - 0.5
        return latent.unsqueeze(2) if self.video else latent

    def decode(self, latent: Tensor) -> Tensor:
        assert latent.shape[1] == self.channels and (latent.ndim == 5) == self.video, "a latent of another family"
        pixels = latent[:, :3].movedim(1, -1) + 0.5
        return pixels.repeat_interleave(self.side, -3).repeat_interleave(self.side, -2)


VAES: dict[str, tuple[int, int, bool]] = {
    "ae.safetensors": (16, 8, False), "flux2-vae.safetensors": (128, 16, False),
    "qwen_image_vae.safetensors": (16, 8, True)}


@functools.cache
def load_network(file: str) -> Any:
    kind, config = NETWORKS[file]
    return build(kind, config, 0)


@functools.cache
def load_encoder(kind: str) -> Any:
    clip = comfy.sd.CLIP(ClipTarget(*ENCODERS[kind]), model_options={"dtype": torch.float32, **SMALL})
    fill_text(clip.cond_stage_model)
    return clip


def describe(kind: str, node: Any) -> dict[str, Any]:
    """A node's definition as far as the conversion of a saved workflow asks."""
    return {"input": node.INPUT_TYPES(), "display_name": kind}


def read_workflow(name: str, definitions: dict[str, Any]) -> Workflow:
    """A template in the API's format; `definitions` are the host's node classes."""
    path = template_path(name)
    kinds = {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]} - {"MarkdownNote"}
    return Workflow.load(path, {kind: describe(kind, definitions[kind]) for kind in kinds})


def shrink(workflow: Workflow) -> None:
    """Pictures of 64 pixels, in eight steps at most."""
    for node in workflow.prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = min(8, node["inputs"]["steps"])
        node["inputs"].update({key: SIDE for key in ("width", "height") if key in node["inputs"]})
        if "megapixels" in node["inputs"]:
            node["inputs"]["megapixels"] = SIDE**2 / 1024**2


def load_tiny(kind: str, inputs: dict[str, Any]) -> Any:
    """What a loader gives, or nothing if the node is none."""
    if kind == "UNETLoader":
        return load_network(inputs["unet_name"])
    if kind in ("CLIPLoader", "DualCLIPLoader"):
        return load_encoder(inputs["type"])
    return TinyVae(*VAES[inputs["vae_name"]]) if kind == "VAELoader" else None


def execute(node: Any, inputs: dict[str, Any]) -> list[Any]:
    """The host's own execution of one node: its outputs."""
    lists = {name: [value] for name, value in inputs.items()}
    if issubclass(node, _ComfyNodeInternal):
        _, _, data = _io.get_finalized_class_inputs(node.INPUT_TYPES(), dict.fromkeys(inputs))
        results = asyncio.run(execution.get_output_data(
            "prompt", "1", node, lists, v3_data={**data, "hidden_inputs": {}}))[0]
    else:
        results = asyncio.run(execution.get_output_data("prompt", "1", node(), lists))[0]
    return [output[0] for output in results]


def run(workflow: Workflow, definitions: dict[str, Any]) -> Tensor:
    """The pictures that are saved: [B, H, W, C]."""
    done: dict[str, list[Any]] = {}

    def outputs(number: str) -> list[Any]:
        if number not in done:
            node = workflow.prompt[number]
            inputs = {name: outputs(value[0])[value[1]] if isinstance(value, list) else value
                      for name, value in node["inputs"].items()}
            loaded = load_tiny(node["class_type"], inputs)
            done[number] = execute(definitions[node["class_type"]], inputs) if loaded is None else [loaded]
        return done[number]

    last, = workflow.ids("SaveImage")
    source, slot = workflow.prompt[last]["inputs"]["images"]
    return outputs(source)[slot]
