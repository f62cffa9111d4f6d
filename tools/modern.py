"""The model families that come as separate files: what to download, which loaders, and how each is usually sampled.

Files, addresses and settings are those of ComfyUI's own template for the family.
"""
from __future__ import annotations

from dataclasses import dataclass

from graph import Graph, Link
from worlds import HUB, Model, say_text

File = tuple[str, str]  # its name, and where its publisher keeps it
SPLIT = "resolve/main/split_files"
Z_FILES = f"{HUB}/Comfy-Org/z_image_turbo/{SPLIT}"
QWEN_FILES = f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/{SPLIT}"
KLEIN_FILES = f"{HUB}/Comfy-Org/flux2-klein/{SPLIT}"
FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"


@dataclass(frozen=True)
class Modern:
    """A family's files and usual settings.

    Attributes:
        kind: the text encoder's type, as its loader calls it.
        shift: of ModelSamplingAuraFlow, where the family is sampled with one; guidance: of FluxGuidance, likewise.
        side: of the square that it is made for.
        empty: the node that makes a latent of it.
    """

    name: str
    network: File
    encoders: tuple[File, ...]
    kind: str
    vae: File
    steps: int
    cfg: float
    sampler: str = "euler"
    shift: float = 0.0
    guidance: float = 0.0
    side: int = 1024
    empty: str = "EmptySD3LatentImage"

    @property
    def files(self) -> str:
        """What a note says of them."""
        return (f"The files of {self.name} go to models/diffusion_models, models/text_encoders and models/vae; missing "
                "ones are offered for download on opening.")


Z_IMAGE = Modern(
    "Z-Image Turbo", ("z_image_turbo_bf16.safetensors", f"{Z_FILES}/diffusion_models"),
    (("qwen_3_4b.safetensors", f"{Z_FILES}/text_encoders"),), "lumina2", ("ae.safetensors", f"{Z_FILES}/vae"),
    steps=8, cfg=1.0, sampler="res_multistep", shift=3.0)
KLEIN = Modern(
    "Flux.2 Klein 4B", ("flux-2-klein-4b.safetensors", f"{KLEIN_FILES}/diffusion_models"),
    (("qwen_3_4b.safetensors", f"{KLEIN_FILES}/text_encoders"),), "flux2",
    ("flux2-vae.safetensors", f"{HUB}/Comfy-Org/flux2-dev/{SPLIT}/vae"),
    steps=4, cfg=1.0, empty="EmptyFlux2LatentImage")
FLUX = Modern(
    "Flux.1 dev", ("flux1-dev.safetensors", f"{HUB}/Comfy-Org/flux1-dev/resolve/main"),
    (("clip_l.safetensors", FLUX_TEXT), ("t5xxl_fp16.safetensors", FLUX_TEXT)), "flux",
    ("ae.safetensors", f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/{SPLIT}/vae"),
    steps=20, cfg=1.0, guidance=3.5)
QWEN = Modern(
    "Qwen-Image", ("qwen_image_fp8_e4m3fn.safetensors", f"{QWEN_FILES}/diffusion_models"),
    (("qwen_2.5_vl_7b_fp8_scaled.safetensors", f"{QWEN_FILES}/text_encoders"),), "qwen_image",
    ("qwen_image_vae.safetensors", f"{QWEN_FILES}/vae"), steps=20, cfg=4.0, shift=3.1, side=1328)


def offer(folder: str, *files: File) -> list[dict[str, str]]:
    """What the GUI needs to offer files for download."""
    return [{"name": name, "url": f"{home}/{name}", "directory": folder} for name, home in files]


def load(graph: Graph, family: Modern) -> Model:
    """The family's loaders, and the shift that it is sampled with."""
    network = graph.add("UNETLoader", change=True, models=offer("diffusion_models", family.network),
                        unet_name=family.network[0])
    if family.shift:
        network = graph.add("ModelSamplingAuraFlow", model=(network, 0), shift=family.shift)
    names = [name for name, _ in family.encoders]
    texts = offer("text_encoders", *family.encoders)
    if len(names) == 2:
        clip = graph.add("DualCLIPLoader", models=texts, clip_name1=names[0], clip_name2=names[1], type=family.kind)
    else:
        clip = graph.add("CLIPLoader", models=texts, clip_name=names[0], type=family.kind)
    vae = graph.add("VAELoader", models=offer("vae", family.vae), vae_name=family.vae[0])
    return Model(network, (network, 0), (clip, 0), (vae, 0))


def size(graph: Graph, family: Modern, count: int = 1) -> Link:
    """An empty latent of the size that the family is made for."""
    return graph.add(family.empty, change=True, width=family.side, height=family.side, batch_size=count), 0


def fit(graph: Graph, family: Modern, picture: Link, model: Model) -> Link:
    """A picture with as many pixels as the family is made for, encoded."""
    fitted = graph.add("ImageScaleToTotalPixels", image=picture, upscale_method="area",
                       megapixels=round(family.side**2 / 1024**2, 2), resolution_steps=16)
    return graph.add("VAEEncode", pixels=(fitted, 0), vae=model.vae), 0


def guide(graph: Graph, family: Modern, prompt: Link, role: str = "", guidance: float | None = None) -> Link:
    """A prompt with the number by which a model of Flux's kind was taught to follow it."""
    if not family.guidance:
        return prompt
    value = family.guidance if guidance is None else guidance
    return graph.add("FluxGuidance", role, change=True, conditioning=prompt, guidance=value), 0


def say_negative(graph: Graph, family: Modern, model: Model) -> Link:
    """What is not wanted; a distilled model is sampled at cfg 1, where nothing reads it."""
    return say_text(graph, "Negative prompt", model, "" if family.cfg == 1 else "blurry, low quality")


def sample(graph: Graph, family: Modern, model: Link, positive: Link, negative: Link, latent: Link) -> Link:
    """The family's usual sampling."""
    if family is not KLEIN:
        return graph.add("KSampler", change=True, model=model, positive=positive, negative=negative,
                         latent_image=latent, steps=family.steps, cfg=family.cfg, sampler_name=family.sampler,
                         scheduler="simple"), 0
    guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=family.cfg)
    noise = graph.add("RandomNoise", change=True)
    solver = graph.add("KSamplerSelect", sampler_name=family.sampler)
    sigmas = graph.add("Flux2Scheduler", steps=family.steps, width=family.side, height=family.side)
    return graph.add("SamplerCustomAdvanced", noise=(noise, 0), guider=(guider, 0), sampler=(solver, 0),
                     sigmas=(sigmas, 0), latent_image=latent), 0
