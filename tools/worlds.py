"""Where a template's models and pictures come from: files of published models, or the demo family without a file."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graph import Graph, Link

HUB = "https://huggingface.co"
FILES = {  # where each publisher keeps the file, and the folder that it goes to
    "v1-5-pruned-emaonly-fp16.safetensors": ("checkpoints", f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive"),
    "DreamShaper_8_pruned.safetensors": ("checkpoints", f"{HUB}/Lykon/DreamShaper"),
    "anything-v3-fp16-pruned.safetensors": ("checkpoints", f"{HUB}/Linaqruf/anything-v3.0"),
    "PixelArtRedmond15V-PixelArt-PIXARFK.safetensors":
        ("loras", f"{HUB}/artificialguybr/pixelartredmond-1-5v-pixel-art-loras-for-sd-1-5"),
    "image-mixer-pruned.ckpt": ("checkpoints", f"{HUB}/lambdalabs/image-mixer"),
}
CLIP_FILE = "clip-vit-large-patch14.safetensors"  # both towers in one file
CLIP_URL = f"{HUB}/openai/clip-vit-large-patch14/resolve/main/model.safetensors"
BASE, DREAM, ANIME, LORA, MIXER = FILES


def where(file: str, folder: str = "") -> list[dict[str, str]]:
    """What the GUI needs to offer a file for download."""
    if file == CLIP_FILE:
        return [{"name": file, "url": CLIP_URL, "directory": folder}]
    directory, home = FILES[file]
    return [{"name": file, "url": f"{home}/resolve/main/{file}", "directory": directory}]


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint's outputs, and its node."""

    node: int
    model: Link
    clip: Link
    vae: Link
    vision: Link = (0, 0)


class Real:
    """Published checkpoints, and pictures of the person's own."""

    suffix: ClassVar[str] = ""
    side: ClassVar[int] = 512
    files: ClassVar[str] = "SD1.x files go to models/checkpoints; missing ones are offered for download on opening. "
    larger: ClassVar[str] = "SDXL: choose such a checkpoint, and 1024 x 1024 (or 1 megapixel)."

    def say(self, real: str, demo: str) -> str:
        return real

    def pick(self, real: float, demo: float) -> float:
        return real

    def model(self, graph: Graph, role: str = "", file: str = BASE, name: str = "shapes") -> Model:
        node = graph.add("CheckpointLoaderSimple", role, change=True, models=where(file), ckpt_name=file)
        return Model(node, (node, 0), (node, 1), (node, 2))

    def lora(self, graph: Graph, model: Model, strength: float) -> Model:
        node = graph.add("LoraLoader", change=True, models=where(LORA), model=model.model, clip=model.clip,
                         lora_name=LORA, strength_model=strength, strength_clip=strength)
        return Model(node, (node, 0), (node, 1), model.vae)

    def mixer(self, graph: Graph, words: bool) -> Model:
        """A checkpoint that was trained on CLIP embeddings, with CLIP's towers; the text tower only for `words`."""
        node = graph.add("CheckpointLoaderSimple", change=True, models=where(MIXER), ckpt_name=MIXER)
        vision = graph.add("CLIPVisionLoader", models=where(CLIP_FILE, "clip_vision"), clip_name=CLIP_FILE)
        clip = graph.add("CLIPLoader", models=where(CLIP_FILE, "text_encoders"), clip_name=CLIP_FILE) if words else 0
        return Model(node, (node, 0), (clip, 0), (node, 2), (vision, 0))

    def judge(self, graph: Graph, model: Model) -> tuple[Link, Link]:
        """A CLIP's vision and text encoder, to measure pictures with."""
        vision = graph.add("CLIPVisionLoader", models=where(CLIP_FILE, "clip_vision"), clip_name=CLIP_FILE)
        clip = graph.add("CLIPLoader", models=where(CLIP_FILE, "text_encoders"), clip_name=CLIP_FILE)
        return (vision, 0), (clip, 0)

    def picture(self, graph: Graph, role: str, caption: str) -> Link:
        return graph.add("LoadImage", role, change=True, image="example.png"), 0

    def encode(self, graph: Graph, picture: Link, model: Model) -> Link:
        """A picture in the size that the model was trained on, encoded."""
        return graph.add("VAEEncode", pixels=self.fit(graph, picture), vae=model.vae), 0

    def fit(self, graph: Graph, picture: Link) -> Link:
        """A picture in the size that the model was trained on."""
        return graph.add("ImageScaleToTotalPixels", image=picture, upscale_method="area", megapixels=0.25,
                         resolution_steps=8), 0

    def size(self, graph: Graph, count: int = 1, side: int = 0) -> Link:
        return graph.add("EmptyLatentImage", width=side or self.side, height=side or self.side, batch_size=count), 0


class Demo(Real):
    """The demo checkpoints and drawn pictures: nothing is downloaded."""

    suffix = " (demo, no download)"
    side = 128
    files = "It uses the small checkpoints and drawn pictures that ship with the pack: no file is needed. "
    larger = ("The demo models know eight shapes (circle, square, triangle, star, heart, cross, ring, moon), plain, "
              "striped, dotted or checkered, in ten colours.")

    def say(self, real: str, demo: str) -> str:
        return demo

    def pick(self, real: float, demo: float) -> float:
        return demo

    def model(self, graph: Graph, role: str = "", file: str = BASE, name: str = "shapes") -> Model:
        node = graph.add("MixologyDemoCheckpoint", role, change=True, name=name)
        return Model(node, (node, 0), (node, 1), (node, 2), (node, 3))

    def mixer(self, graph: Graph, words: bool) -> Model:
        return self.model(graph, name="mixer")

    def picture(self, graph: Graph, role: str, caption: str) -> Link:
        return graph.add("MixologyDemoPicture", role, change=True, caption=caption, seed=5, width=self.side,
                         height=self.side), 0

    def fit(self, graph: Graph, picture: Link) -> Link:
        return picture

    def judge(self, graph: Graph, model: Model) -> tuple[Link, Link]:
        return model.vision, model.clip

    def size(self, graph: Graph, count: int = 1, side: int = 0) -> Link:
        return super().size(graph, count, self.side)


def say_text(graph: Graph, role: str, model: Model, text: str, change: bool = True) -> Link:
    """A prompt."""
    return graph.add("CLIPTextEncode", role, change=change and bool(text), clip=model.clip, text=text), 0


def save(graph: Graph, latent: Link, model: Model, prefix: str) -> Link:
    """From a latent to the saved picture; returns where it is decoded."""
    decode = graph.add("VAEDecode", samples=latent, vae=model.vae)
    graph.add("SaveImage", images=(decode, 0), filename_prefix=f"mixology/{prefix}")
    return decode, 0


def sample_custom(graph: Graph, model: Model, guider: Link, latent: Link, sampler: Link | None = None,
                  steps: int = 30, denoise: float = 1.0) -> Link:
    """Sampling with a guider; ddim unless a sampler is given."""
    noise = graph.add("RandomNoise", change=True)
    if sampler is None:
        sampler = graph.add("KSamplerSelect", sampler_name="ddim"), 0
    sigmas = graph.add("BasicScheduler", model=model.model, scheduler="ddim_uniform", steps=steps, denoise=denoise)
    return graph.add("SamplerCustomAdvanced", noise=(noise, 0), guider=guider, sampler=sampler, sigmas=(sigmas, 0),
                     latent_image=latent), 0


def sample(graph: Graph, model: Link, positive: Link, negative: Link, latent: Link, steps: int, cfg: float,
           role: str = "", seed: int | Link = 0) -> Link:
    """The host's own KSampler with ddim."""
    return graph.add("KSampler", role, change=True, model=model, positive=positive, negative=negative,
                     latent_image=latent, seed=seed, steps=steps, cfg=cfg, sampler_name="ddim",
                     scheduler="ddim_uniform"), 0
