"""The demo checkpoints: the host's own classes at demo size, and the files that hold them.

The denoiser is the host's SD1.x model (`BaseModel` around `UNetModel`, eps prediction, SD1.x schedule and latent
format) with the sizes of `demo/config.json`; the text encoder is `comfy.sd.CLIP` with the SD1 classes around a small
CLIP text model; the autoencoder is `comfy.sd.VAE` around TAESD. Their weights are read into float32 on every device;
those of the CLIP vision model into what the host takes for it.
Sources: `load_state_dict_guess_config` and `load_diffusion_model_state_dict` of the host's comfy/sd.py.
"""
from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
import torch.nn.functional as F
from comfy import clip_model, sd1_clip, supported_models, supported_models_base
from safetensors import SafetensorError, safe_open

from ..demo.difference import add_difference, combined_shapes, is_difference
from ..demo.world import draw_scene, parse_caption
from ..samplers.wording import check_text, legible
from .files import fingerprint_files, tell_fault

DEMO = Path(__file__).resolve().parent.parent / "demo"
MODEL, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
VISION = ("vision_model.", "visual_projection.")
PROJECTION = "transformer.text_projection.weight"  # unused by SD1.x, and left out by the host's savers
CLIP_PROJECTION = "text_projection.weight"  # the same in the file of the demo CLIP, beside its vision tower
ON_EMBEDDINGS = ("mixer",)  # the shipped checkpoints that were not trained on prompts
SAVE_FOLDERS = ("checkpoints", "diffusion_models")  # where the host's savers write and its loaders look
LARGEST_FILE = 1 << 28  # bytes; a saved demo checkpoint has about 60 MB, so a larger file is never opened

Shapes = dict[str, tuple[int, ...]]


def read_config() -> dict[str, Any]:
    """Sizes of the networks and names of the shipped checkpoints."""
    return json.loads((DEMO / "config.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- files

def shipped_file(name: str) -> Path:
    """A file of the pack: `vae`, `text`, `clip` or the name of a shipped checkpoint."""
    return DEMO / f"{name}.safetensors"


def reads_prompts(name: object) -> bool:
    """Whether a name is that of a shipped checkpoint which was trained on prompts."""
    return name in read_config()["checkpoints"] and name not in ON_EMBEDDINGS


def shipped_name(model: Any) -> str | None:
    """The shipped checkpoint that a MODEL was loaded from; None of another."""
    loader, arguments = (model.cached_patcher_init or (None, ()))[:2]
    if loader is not load_model or not arguments or Path(arguments[0]).parent != DEMO:
        return None
    return Path(arguments[0]).stem


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of the tensors in a safetensors file, from its header alone.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(
            f"Demo Checkpoint expected the file '{legible(path.name)}', got none at {legible(path.parent, 200)}; "
            f"restore it.")
    try:
        with safe_open(path, framework="numpy") as file:
            names: list[str] = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Demo Checkpoint expected a whole safetensors file, but '{legible(path.name)}' is damaged "
            f"({legible(error)}); save the model again or choose another."
        ) from None


def select_part(shapes: Shapes, prefix: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.startswith(prefix) and not key.endswith(PROJECTION)}


def base_file() -> Path:
    """The checkpoint that the other shipped ones are stored as differences from."""
    return shipped_file(read_config()["checkpoints"][0])


def check_shapes(path: Path) -> Shapes:
    """The file's names and shapes, held against the shipped files. Text encoder and autoencoder may be left out.

    Raises:
        ValueError: if the file is damaged or holds networks of other sizes.
    """
    shapes = read_shapes(path)
    base = base_file()
    if is_difference(shapes):
        shapes = combined_shapes(read_shapes(base), shapes)
    for prefix, name, part in ((MODEL, base.stem, "model"), (TEXT, "text", "text encoder"), (VAE, "vae", "VAE")):
        found = select_part(shapes, prefix)
        if (found or prefix == MODEL) and found != select_part(read_shapes(shipped_file(name)), prefix):
            raise ValueError(
                f"Demo Checkpoint expected the sizes of the demo {part}, but '{legible(path.name)}' holds "
                f"{'another one' if found else 'none'}; choose a file that ModelSave or Save Checkpoint wrote from a "
                f"demo checkpoint, and open other models with Load Checkpoint."
            )
    return shapes


def find_file(name: object) -> Path:
    """The file of a shipped checkpoint ("shapes") or of a saved one ("[checkpoints] folder/file.safetensors").

    Only names that the host itself lists are looked up, so that no name leads out of its folders.

    Raises:
        ValueError: if there is no such file, or the name is no text.
    """
    if isinstance(name, str):
        if name in read_config()["checkpoints"]:
            return shipped_file(name)
        folder, _, file = name.removeprefix("[").partition("] ")
        if folder in SAVE_FOLDERS and file in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, file)
            if path is not None:
                return Path(path)
    raise ValueError(
        f"Demo Checkpoint finds no '{legible(name)}'; choose one of its list, and refresh the list (R) after saving a "
        f"model."
    )


def is_saved_demo(folder: str, file: str) -> bool:
    path = folder_paths.get_full_path(folder, file)
    if path is None or not file.endswith(".safetensors"):
        return False
    try:
        found = Path(path).stat()
    except OSError:  # gone
        return False
    return found.st_size <= LARGEST_FILE and has_demo_sizes(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1 << 12)
def has_demo_sizes(path: str, changed: int, size: int) -> bool:
    """Whether a file holds the demo networks: asked once for each age and size of a file, as the host wants the list
    several times a prompt."""
    try:
        check_shapes(Path(path))
    except (ValueError, OSError):  # damaged, unreadable or another model: not for this list
        return False
    return True


def list_names() -> list[str]:
    """The shipped checkpoints, then the saved ones that the host lists and that have the demo sizes."""
    saved = [
        f"[{folder}] {file}"
        for folder in SAVE_FOLDERS
        for file in folder_paths.get_filename_list(folder)
        if is_saved_demo(folder, file)
    ]
    return [*read_config()["checkpoints"], *saved]


def find_fault(name: object) -> str | None:
    """What keeps `name` from loading, in one sentence; None if nothing does."""
    return tell_fault(lambda: check_shapes(find_file(name)))


def fingerprint(name: object) -> str | float:
    """Changes when a file behind `name` changes; see `fingerprint_files`."""
    return fingerprint_files(
        name, lambda: (find_file(name), base_file(), *(shipped_file(part) for part in ("text", "vae", "clip"))))


def read_part(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, copied to float32, names kept.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    keys = [key for key in read_shapes(path) if key.startswith(prefix)]
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).to(torch.float32, copy=True) for key in keys}


# ------------------------------------------------------------------------------------------------- classes

class DemoTextModel(clip_model.CLIPTextModel):
    """The host's CLIP text model, which has CLIP's 49408 words whatever its config says, with our few."""

    def __init__(self, config_dict: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        rows, width = config_dict["vocab_size"], config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(rows, width, dtype=dtype, device=device))


class DemoClipModel(sd1_clip.SDClipModel):
    """SD1.x's text encoder at demo size: last hidden states after the final norm, [B, 77, C]."""

    def __init__(self, **options: Any) -> None:
        text = read_config()["text"]
        special = {"start": text["bos_token_id"], "end": text["eos_token_id"], "pad": text["pad_token_id"]}
        super().__init__(
            textmodel_json_config=text, model_class=DemoTextModel, special_tokens=special,
            return_projected_pooled=False, **options)


class DemoTokenizer(sd1_clip.SDTokenizer):
    """SD1.x's tokenizer with the demo vocabulary: one token for a known word, bytes for any other."""

    def __init__(self, **options: Any) -> None:
        width = read_config()["text"]["hidden_size"]
        super().__init__(tokenizer_path=str(DEMO / "tokenizer"), embedding_size=width, **options)

    def tokenize_with_weights(self, text: str, *arguments: Any, **options: Any) -> Any:
        check_text(text, "The text of a prompt")
        return super().tokenize_with_weights(text, *arguments, **options)


class DemoModelConfig(supported_models.SD15):
    """SD1.x in all but its sizes, which come from `demo/config.json`."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}  # SD1.x has eight heads

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        set_preview(self.latent_format)

    def process_clip_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Host names for the text encoder's tensors. The projection, which prompts do not use, is the demo CLIP's."""
        kept = {key: value for key, value in state_dict.items() if not key.endswith(PROJECTION)}
        state = super().process_clip_state_dict(kept)
        state[f"clip_l.{PROJECTION}"] = read_part(shipped_file("clip"), CLIP_PROJECTION)[CLIP_PROJECTION]
        return state

    def clip_target(self, state_dict: dict[str, torch.Tensor] | None = None) -> supported_models_base.ClipTarget:
        return supported_models_base.ClipTarget(
            partial(sd1_clip.SD1Tokenizer, tokenizer=DemoTokenizer),
            partial(sd1_clip.SD1ClipModel, clip_model=DemoClipModel))


def set_preview(latent_format: Any) -> None:
    """Gives a latent format of the host's the colours of the demo autoencoder, for the live preview while sampling.

    Its latents are no linear picture of colours: a pixel and its neighbours go through one hidden layer first. Fitted
    by demo/train_preview.py.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    state = read_part(shipped_file("preview"), "")

    def show_features(latents: torch.Tensor) -> torch.Tensor:  # [B, 4, h, w] in the model's space to [B, F, h, w]
        padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, state["weight"].to(latents), state["bias"].to(latents)).relu()

    latent_format.latent_rgb_factors_reshape = show_features
    latent_format.latent_rgb_factors = state["factors"].tolist()
    latent_format.latent_rgb_factors_bias = state["factors_bias"].tolist()
    latent_format.taesd_decoder_name = None  # that of SD1.x knows other latents


# ------------------------------------------------------------------------------------------------- loading

def load_model(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The denoiser, placed and managed as the host's own diffusion model loader does.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    state = read_part(path, MODEL)
    if is_difference(state):
        state = add_difference(read_part(base_file(), MODEL), state)
    config = DemoModelConfig(read_config()["unet"])
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, MODEL)
    offload_device = comfy.model_management.unet_offload_device()
    patcher_class = (
        comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher)
    patcher = patcher_class(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state, MODEL, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (path,))
    return patcher


def load_clip(path: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The text encoder with its tokenizer.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    config = DemoModelConfig(read_config()["unet"])
    state = config.process_clip_state_dict(read_part(path, TEXT))
    clip = comfy.sd.CLIP(
        config.clip_target(),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(value.numel() for value in state.values()),
        state_dict=state,
        model_options={"dtype": torch.float32},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (load_clip_patcher, (path,))
    return clip


def load_vae(path: Path) -> comfy.sd.VAE:
    """The autoencoder: [B, H, W, C] in 0..1 to [B, 4, H/8, W/8] and back.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    state = {key.removeprefix(VAE): value for key, value in read_part(path, VAE).items()}
    vae = comfy.sd.VAE(sd=state, dtype=torch.float32)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path,))
    return vae


def load_clip_vision() -> comfy.clip_vision.ClipVisionModel:
    """The vision tower of the demo CLIP, whose text tower is the prompt encoder with its projection.

    Raises:
        ValueError: if its file is missing or damaged.
    """
    path = shipped_file("clip")
    vision = comfy.clip_vision.ClipVisionModel(str(DEMO / "clip_vision.json"))
    state = {name: value.to(vision.dtype) for prefix in VISION for name, value in read_part(path, prefix).items()}
    vision.load_sd(state)
    return vision


def load_clip_patcher(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """What the host calls for a second copy of the text encoder."""
    return load_clip(path, disable_dynamic).patcher


def load_vae_patcher(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """What the host calls for a second copy of the autoencoder; it has no other kind of patcher for one."""
    return load_vae(path).patcher


def load_checkpoint(name: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Model, text encoder and autoencoder; a file without the last two gets the shipped ones.

    Raises:
        ValueError: if there is no such file, or it is damaged or of other sizes.
    """
    path = find_file(name)
    shapes = check_shapes(path)
    text = path if select_part(shapes, TEXT) else shipped_file("text")
    vae = path if select_part(shapes, VAE) else shipped_file("vae")
    return load_model(path), load_clip(text), load_vae(vae)


def draw_picture(caption: str, seed: int, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of the demo world as the host's image [1, H, W, C] and its silhouette as a mask [1, H, W].

    Raises:
        ValueError: on a word that the demo world does not know.
    """
    scene = parse_caption(caption, lambda word: f"'{legible(word)}'")
    image, mask = draw_scene(scene, seed, width, height)
    return image[None], mask[None]
